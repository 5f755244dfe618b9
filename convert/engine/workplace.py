"""Where a conversion works: a hidden directory beside its target, never taken for a result."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from zoo.containers import committed, filenames
from zoo.containers.base import fsync
from zoo.containers.errors import from_os
from zoo.containers.filenames import WORKPLACE

if sys.platform == "win32":
    raise ImportError("zooconvert does not run on Windows, which lacks fcntl: use Linux, or WSL")
import fcntl

RECORD = "resume.json"  # in a workplace, makes it one that --resume can go on with
COMMITTING = threading.Lock()  # held while files are renamed
_at_work: list[Path] = []  # what this process would leave behind
_FINISHED = "committed"
_PATIENCE = 1.0  # seconds


@dataclass(frozen=True)
class Leftover:
    """What a conversion that was killed left: "resumable", "committed" (whole, it only had to be
    moved to its place) or "dead"."""

    path: Path
    nbytes: int
    kind: str


@contextlib.contextmanager
def workplace(target: Path, accept: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """A directory beside `target` that is gone afterwards; an interrupt leaves one with a RECORD.

    It is empty, or one with a RECORD that was left, where `accept` is given and raises nothing.
    What else killed processes left beside the same target goes, or is put in its place: whoever is
    alive holds a lock. An OSError becomes a ZooError that names the user's path.
    """
    with contextlib.ExitStack() as held, _named(target):
        with locked(target.parent, wait=True):
            complete(target)
            name = glob.escape(target.name)
            found = leftovers(target.parent, remove=accept is None, target=name)
            begun = [left.path for left in found if left.kind == "resumable"]
            if accept is None or not begun:
                prefix = f".{target.name}{WORKPLACE}"
                place = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
            else:
                place = max(begun, key=lambda p: p.stat().st_mtime_ns)
                accept(place)
            held.enter_context(locked(place, wait=True))
        with scratch(place):
            yield place


@contextlib.contextmanager
def scratch(place: Path) -> Iterator[Path]:
    """The directory is removed at the end; an interrupt leaves one with a RECORD."""
    _at_work.append(place)
    try:
        yield place
    except Exception:
        shutil.rmtree(place, ignore_errors=True)
        raise
    except BaseException:
        _leave(place)
        raise
    else:
        shutil.rmtree(place, ignore_errors=True)
    finally:
        _at_work.remove(place)


def abandon() -> list[Path]:
    """Remove what this process has not finished, for it is about to end; what is left of it can be
    resumed. Threads may still be writing. A commit is waited for."""
    if not COMMITTING.acquire(timeout=_PATIENCE):  # waits for another process, or a slow disk
        return []
    return [place for place in list(_at_work) if _leave(place)]


def _leave(place: Path) -> bool:
    """Remove the directory but for one that can be resumed; whether it is there still."""
    if (place / RECORD).is_file():
        return True
    for _ in range(3):  # others may make files in it meanwhile
        shutil.rmtree(place, ignore_errors=True)
        if not place.exists():
            break
    return False


def leftovers(directory: Path, remove: bool, target: str = "*") -> list[Leftover]:
    """What processes that were killed left in a directory; with `remove` it is gone afterwards,
    and what was committed is in its place. Whoever is alive holds a lock, and is left alone.
    `target` is a pattern for the names of the targets."""
    found = []
    for left in sorted(directory.glob(f".{target}{WORKPLACE}*")):
        with locked(left, wait=False) as free:
            if free and left.is_dir() and not left.is_symlink():
                size = sum(p.lstat().st_size for p in left.rglob("*") if p.is_file())
                of = left.with_name(left.name[1:].rpartition(WORKPLACE)[0])
                kind = "resumable" if (left / RECORD).is_file() else "dead"
                if left == committed.place(of) and committed.listed(of) is not None:
                    kind = _FINISHED
                found.append(Leftover(left, size, kind))
                if remove and kind == _FINISHED:
                    complete(of)
                elif remove:
                    shutil.rmtree(left, ignore_errors=True)
    return found


def reclaimable(target: Path) -> int:
    """Bytes of the disk that the next conversion to `target` removes, or goes on with."""
    found = leftovers(target.parent, remove=False, target=glob.escape(target.name))
    files = [p for f in found if f.kind != _FINISHED for p in f.path.rglob("*")]
    return sum(512 * p.lstat().st_blocks for p in files)


def complete(target: Path) -> None:
    """Move the files of a commit to their places, if one was cut short; the directory is locked.

    From the renaming of `committed.place` on they are what readers find. Weights come last: where
    there were none, they appear with all that belongs to them.
    """
    place, names = committed.place(target), committed.listed(target)
    if names is None:
        return
    for old in list(target.parent.iterdir()):
        if filenames.belongs(old.name, target.name) and old.name not in names:
            old.unlink(missing_ok=True)
    for name in sorted(names, key=lambda n: (n == target.name, n)):
        new, old = place / name, target.with_name(name)
        if os.path.lexists(new):
            if old.is_dir() and not old.is_symlink():
                os.rename(old, place / f"old-{secrets.token_hex(4)}")
            os.replace(new, old)
    fsync(place)
    fsync(target.parent)
    aside = place.with_name(f".{target.name}{WORKPLACE}{secrets.token_hex(4)}")
    os.rename(place, aside)
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def locked(directory: Path, wait: bool) -> Iterator[bool]:
    """Whether this process holds the lock of a directory; it goes with the process."""
    try:
        fd = os.open(directory, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        yield False
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        held = True
    except BlockingIOError:
        held = False
    try:
        yield held
    finally:
        os.close(fd)


@contextlib.contextmanager
def _named(target: Path) -> Iterator[None]:
    """An OSError as a ZooError that names what the user named."""
    try:
        yield
    except OSError as e:
        file = str(e.filename) if e.filename is not None else ""
        inside = f"{target.parent / f'.{target.name}{WORKPLACE}'}"
        raise from_os(e, str(target) if not file or file.startswith(inside) else file) from e
