"""The console script, and `python -m convert`: the command line, once it is imported."""

from __future__ import annotations

import os
import signal
from typing import Any, NoReturn


def main() -> NoReturn:
    """Run the command line. Ctrl-C before it is imported ends the process, as it does later."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    from convert.cli.main import main as run

    run()


def _end(signum: int, frame: Any) -> NoReturn:
    os.write(2, b"error: interrupted; nothing was left behind\n")
    os._exit(130)


if __name__ == "__main__":
    main()
