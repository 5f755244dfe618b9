"""All or nothing on disk: what was made in a workplace takes its place in one rename.

An existing target stays as it is until the new one is complete, verified and synced.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
from pathlib import Path

from convert.engine.workplace import COMMITTING, complete, locked
from convert.training_state.storage import of_directory
from zoo.containers import committed, filenames, open_checkpoint
from zoo.containers.base import fsync
from zoo.containers.errors import NoSpace, UsageError, ZooError
from zoo.containers.orbax_dir.zarr import is_array

_AT_FDCWD, _EXCHANGE = -100, 2


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
    if committed.listed(target) is not None and not force:
        raise UsageError(
            f"{target} exists already", "replace it with --force, or name another target"
        )
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


def commit(place: Path, target: Path, force: bool) -> None:
    """Put everything in `place` where it belongs, in one step: `place/NAME` becomes its sibling.

    A directory changes places with what was there. Of a checkpoint that is one file, all that
    belongs to it is renamed at once (see `zoo.containers.committed`), and then moved; what the
    old one had and the new one has not is removed. Two commits into one directory take turns, and
    without `force` the second finds the target there: UsageError.
    """
    with COMMITTING, locked(target.parent, wait=True):
        complete(target)
        check_replaceable(target, force)
        names = [p.name for p in place.iterdir()]
        for name in names:
            if filenames.is_named_by_content(name, target.name):  # it takes nobody else's place
                os.replace(place / name, target.with_name(name))
        if (place / target.name).is_dir():
            _replace(place / target.name, target)
            fsync(target.parent)
            for name in filenames.SIDECARS:
                target.with_name(f"{target.name}.{name}").unlink(missing_ok=True)
            return
        files = sorted(n for n in names if filenames.belongs(n, target.name))
        write_text(place / committed.JOURNAL, json.dumps({"files": files}))
        fsync(place)
        fsync(target.parent)
        os.rename(place, committed.place(target))
        fsync(target.parent)
        complete(target)


def write_text(path: Path, text: str) -> None:
    """Write and sync a small file."""
    with path.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def _replace(new: Path, old: Path) -> None:
    """Rename a directory; what is in the way changes places with it in one step."""
    try:
        os.replace(new, old)
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR, errno.ENOTDIR):
            raise
        if not _exchange(new, old):
            raise UsageError(
                f"{old} cannot be replaced in one step on this file system",
                "remove it first, or name another target",
            ) from None


def _exchange(a: Path, b: Path) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        at, ways = _AT_FDCWD, (os.fsencode(a), os.fsencode(b))
        return bool(libc.renameat2(at, ways[0], at, ways[1], _EXCHANGE) == 0)
    if hasattr(libc, "renamex_np"):  # macOS
        return bool(libc.renamex_np(os.fsencode(a), os.fsencode(b), _EXCHANGE) == 0)
    return False
