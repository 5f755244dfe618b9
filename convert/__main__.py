"""The console script, and `python -m convert`: the command line, once it is imported."""

from __future__ import annotations

import os
import signal
from typing import Any, NoReturn


def main() -> NoReturn:
    """Run the command line. Ctrl-C before it is imported ends the process, as it does later; once
    it is done, while the interpreter takes itself down, it changes nothing."""
    _handle(_end)
    from convert.cli.main import main as run

    try:
        run()
    finally:
        _handle(signal.SIG_IGN)


def _handle(handler: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as in the background of a script
            signal.signal(number, handler)


def _end(signum: int, frame: Any) -> NoReturn:
    os.write(2, b"error: interrupted; nothing was left behind\n")
    os._exit(130)


if __name__ == "__main__":
    main()
