"""Ctrl-C and SIGTERM: the process ends by itself, soon, with exit code 130.

An exception raised wherever the interpreter happens to be is swallowed or turned into another one
by imports, by C++ and by whoever catches too much. So none is raised: a thread wakes up, removes
what would be left behind, says what can be resumed, and ends the process.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LONGEST = 60  # seconds that another way out waits for the thread
_ending = threading.Event()


@contextlib.contextmanager
def watched(arguments: list[str]) -> Iterator[None]:
    """While a command runs. `arguments` are the command's, for the one that resumes it."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as in the background of a script
            signal.signal(number, lambda signum, frame: None)
    threading.Thread(target=_wait, args=(reader, arguments), daemon=True).start()
    try:
        yield
    finally:
        give_way()
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken)
        os.close(writer)


def give_way() -> None:
    """Come to no other end while the process is being ended: what fails now fails of that."""
    if _ending.is_set():
        time.sleep(_LONGEST)


def _wait(reader: int, arguments: list[str]) -> None:
    while (data := os.read(reader, 1)) and data[0] not in _SIGNALS:
        pass
    if not data:
        os.close(reader)
        return
    _ending.set()
    try:
        _say(_abandoned(), arguments)
    finally:
        os._exit(130)


def _abandoned() -> list[str]:
    """What is left of what was being written, and can be resumed."""
    abandon = getattr(sys.modules.get("convert.engine.workplace"), "abandon", None)
    return [str(place) for place in abandon()] if abandon else []


def _say(kept: list[str], arguments: list[str]) -> None:
    lines = ["error: interrupted; nothing was left behind"]
    if kept:
        again = shlex.join(["zooconvert", *(a for a in arguments if a != "--resume"), "--resume"])
        lines = [f"error: interrupted; what is done is kept in {', '.join(kept)}", f"try: {again}"]
    # A bar that was being drawn has hidden the cursor.
    clear = "\r\x1b[K\x1b[?25h" if sys.stderr.isatty() else ""
    text = "\n".join("".join(c if c.isprintable() else ascii(c)[1:-1] for c in x) for x in lines)
    os.write(2, f"{clear}{text}\n".encode(errors="replace"))
