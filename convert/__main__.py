"""`python -m convert`: the command line."""

from convert.cli.main import main

if __name__ == "__main__":
    main()
