"""All or nothing on disk: work in a sibling, then one rename.

An existing target stays as it is until the new one is complete, verified and synced.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from zoo.containers import open_checkpoint
from zoo.containers.base import fsync_directory
from zoo.containers.errors import NoSpace, UsageError, ZooError

_MARK = ".zooconvert-"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_target(target: Path, source: Path, force: bool) -> None:
    """UsageError if `target` cannot or may not be written, before any work is done."""
    here, there = target.resolve(), source.resolve()
    if (
        here == there
        or there.is_relative_to(here)
        or (here.is_relative_to(there) and there.is_dir())
    ):
        raise UsageError(
            f"the target {target} is the source, or one lies in the other", "name another target"
        )
    if not target.parent.is_dir():
        raise UsageError(f"the directory {target.parent} does not exist", "make it first")
    if not os.access(target.parent, os.W_OK):
        raise UsageError(f"{target.parent} cannot be written to", "choose another target: give DST")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not force:
        raise UsageError(
            f"{target} exists already", "replace it with --force, or name another target"
        )
    if target.is_dir() and not _ours_to_replace(target):
        raise UsageError(
            f"{target} is a directory that holds no checkpoint; --force would delete it whole",
            "name another target, or remove it yourself",
        )


def check_space(directory: Path, needed: int) -> None:
    """NoSpace if the file system of `directory` has less than `needed` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise NoSpace(
            f"{directory} has {free / 1e9:.2f} GB free, the result needs {needed / 1e9:.2f} GB",
            "make room, or name a target on another disk",
        )


@contextlib.contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """An empty directory beside `target` that is gone afterwards, whatever happens.

    What a killed process left beside the same target goes too.
    """
    for left in target.parent.glob(f".{target.name}{_MARK}*"):
        if not _alive(left.name.rpartition("-")[2]):
            shutil.rmtree(left, ignore_errors=True)
    place = target.with_name(f".{target.name}{_MARK}{os.getpid()}")
    shutil.rmtree(place, ignore_errors=True)
    try:
        place.mkdir()
        yield place
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(
                f"the disk is full: {target.parent}", "make room, or name a target on another disk"
            ) from e
        raise ZooError(
            f"{e.filename or target}: {e.strerror or e}", "see that the disk works"
        ) from e
    finally:
        shutil.rmtree(place, ignore_errors=True)


def commit(place: Path, target: Path) -> None:
    """Put everything in `place` where it belongs: `place/NAME` becomes its sibling NAME.

    The target goes first; what stands beside it (certificate, config) follows.
    """
    names = sorted((p.name for p in place.iterdir()), key=lambda n: n != target.name)
    for name in names:
        _replace(place / name, target.with_name(name))
    fsync_directory(target.parent)


def write_text(path: Path, text: str) -> None:
    """Write and sync a small file."""
    with path.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def _replace(new: Path, old: Path) -> None:
    """Rename `new` to `old`; a directory in the way changes places with it in one step."""
    try:
        os.replace(new, old)
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR, errno.ENOTDIR):
            raise
        if not _exchange(new, old):  # not Linux: two renames, the old one kept until the second
            aside = new.with_name(new.name + ".old")
            os.rename(old, aside)
            os.rename(new, old)


def _exchange(a: Path, b: Path) -> bool:
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done = renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    return bool(done == 0)


def _ours_to_replace(directory: Path) -> bool:
    if (directory / "certificate.json").is_file():
        return True
    try:
        with open_checkpoint(directory):
            return True
    except ZooError:
        return False


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True
