"""The files beside an ONNX file that hold its larger tensors: opened only where they can be meant.

A location is a path that the file states. It may lead nowhere but to a plain file in the ONNX
file's own folder or below it: not up, not from the root, and through no link of either kind, which
would lead to what the file's author chose.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from zoo.containers.errors import CorruptInput, UnsafeInput, printable

_ADVICE = "get the file from a source that you trust; copy what is linked into its folder"
_PLAIN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def open_beside(path: Path, location: str) -> int:
    """A descriptor of the file that `path` calls `location`. Raises UnsafeInput where that is
    outside the folder or a link, CorruptInput where there is no such file."""
    what = f"{path}: its data in {printable(location)}"
    parts = [p for p in location.split("/") if p != "."]
    if not parts or not all(parts) or ".." in parts or "\0" in location:  # "/a" has an empty part
        raise UnsafeInput(f"{what} would be outside its folder", _ADVICE)
    at = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            inner = _open(part, _PLAIN | os.O_DIRECTORY, at, what)
            os.close(at)
            at = inner
        fd = _open(parts[-1], _PLAIN, at, what)
    finally:
        os.close(at)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        os.close(fd)
        kind = "has other names too (a hard link)" if stat.S_ISREG(found.st_mode) else "is no file"
        raise UnsafeInput(f"{what}: that {kind}", _ADVICE)
    return fd


def _open(part: str, flags: int, folder: int, what: str) -> int:
    try:
        if stat.S_ISLNK(os.stat(part, dir_fd=folder, follow_symlinks=False).st_mode):
            raise UnsafeInput(f"{what}: {printable(part)} is a link", _ADVICE)
        return os.open(part, flags, dir_fd=folder)
    except (OSError, ValueError) as e:
        why = (e.strerror if isinstance(e, OSError) else None) or str(e)
        raise CorruptInput(
            f"{what} cannot be read: {why}", "copy the file that belongs to it beside it"
        ) from None
