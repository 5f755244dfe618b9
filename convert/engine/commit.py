"""All or nothing on disk: work in a sibling, then one rename.

An existing target stays as it is until the new one is complete, verified and synced.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from convert.training_state.storage import of_directory
from zoo.containers import filenames, open_checkpoint
from zoo.containers.base import fsync
from zoo.containers.errors import NoSpace, UsageError, ZooError
from zoo.containers.orbax_dir.zarr import is_array

if sys.platform == "win32":
    raise ImportError("zooconvert does not run on Windows, which lacks fcntl: use Linux, or WSL")
import fcntl

_MARK = ".zooconvert-"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_paths(target: Path, source: Path | None) -> None:
    """UsageError if `target` cannot be written where it is, before any work is done. `source` is
    None for what lies in memory."""
    here, there = target.resolve(), None if source is None else source.resolve()
    if there is not None and (
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


def check_replaceable(target: Path, force: bool) -> None:
    """UsageError if something stands at `target` that may not be replaced. Asked before any work is
    done, and again when it is: another process may have been faster."""
    moments = target.with_name(f"{target.name}.{filenames.OPTIMIZER}")
    if moments.exists() and not force:
        raise UsageError(
            f"{moments} exists already", "replace it with --force, or name another target"
        )
    if filenames.is_whole(target) and (theirs := of_directory(target.parent)):
        raise UsageError(
            f"{theirs} would be taken for the optimizer of {target.name}",
            f"name another target, or the directory: {target.parent}",
        )
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    strangers = (
        [p.name for p in target.iterdir() if not (filenames.is_ours(p.name) or is_array(p))]
        if (target.is_dir() and not target.is_symlink())
        else []
    )
    if strangers:
        raise UsageError(
            f"{target} holds more than a checkpoint: {', '.join(sorted(strangers)[:3])}",
            "name another target; it would be replaced whole",
        )
    if (
        target.is_file()
        and target.suffix not in filenames.CHECKPOINT_SUFFIXES
        and not _is_checkpoint(target)
    ):
        raise UsageError(f"{target} exists and is not a checkpoint", "name another target")
    if not force:
        raise UsageError(
            f"{target} exists already", "replace it with --force, or name another target"
        )


def _is_checkpoint(path: Path) -> bool:
    try:
        with open_checkpoint(path):
            return True
    except ZooError:
        return False


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

    What a killed process left beside the same target goes too: whoever is alive holds a lock.
    """
    place = None
    with contextlib.ExitStack() as held:
        try:
            with _locked(target.parent, wait=True):
                leftovers(target.parent, remove=True, target=glob.escape(target.name))
                prefix = f".{target.name}{_MARK}"
                place = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
                held.enter_context(_locked(place, wait=True))
            yield place
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(
                    f"the disk is full: {target.parent}",
                    "make room, or name a target on another disk",
                ) from e
            raise ZooError(
                f"{e.filename or target}: {e.strerror or e}", "see that the disk works"
            ) from e
        finally:
            if place is not None:
                shutil.rmtree(place, ignore_errors=True)


def commit(place: Path, target: Path, force: bool) -> None:
    """Put everything in `place` where it belongs: `place/NAME` becomes its sibling NAME.

    The target goes first; what stands beside it (certificate, config) follows. The old target's
    moments go before all: a process killed in between leaves none beside weights of another step.
    Two commits into one directory take turns, and without `force` the second finds the target
    there: UsageError.
    """
    names = sorted((p.name for p in place.iterdir()), key=lambda n: n != target.name)
    with _locked(target.parent, wait=True):
        check_replaceable(target, force)
        old = target.with_name(f"{target.name}.{filenames.OPTIMIZER}")
        if old.exists():
            old.unlink()
            fsync(target.parent)
        for name in names:
            _replace(place / name, target.with_name(name))
        fsync(target.parent)


def write_text(path: Path, text: str) -> None:
    """Write and sync a small file."""
    with path.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def leftovers(directory: Path, remove: bool, target: str = "*") -> list[tuple[Path, int]]:
    """The workplaces in a directory of processes that were killed, and the bytes of each; with
    `remove` they are gone afterwards. Whoever is alive holds a lock, and is left alone. `target`
    is a pattern for the names of the targets."""
    found = []
    for left in sorted(directory.glob(f".{target}{_MARK}*")):
        with _locked(left, wait=False) as free:
            if free and left.is_dir() and not left.is_symlink():
                size = sum(p.lstat().st_size for p in left.rglob("*") if p.is_file())
                found.append((left, size))
                if remove:
                    shutil.rmtree(left, ignore_errors=True)
    return found


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


@contextlib.contextmanager
def _locked(directory: Path, wait: bool) -> Iterator[bool]:
    """Whether this process holds the lock of a directory; it goes with the process."""
    try:
        fd = os.open(directory, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(fd)
