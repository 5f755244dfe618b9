"""JSON that comes with a checkpoint, and may be anything: what is wrong is a ValueError."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any


def parse(text: str | bytes) -> Any:
    """The value; ValueError for what is not JSON, is nested too deep, or no number can be."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read(path: Path, most: int) -> Any:
    """The value in a file of at most so many bytes. ValueError, or OSError where it cannot be
    read."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # of a pipe nothing is waited for
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a file")
        if status.st_size > most:
            raise ValueError(f"it has {status.st_size} bytes, at most {most} are read")
        return parse(file.read(most))
