"""An Orbax checkpoint as a directory: what it is, whether it is complete, and its small files."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

from zoo.containers.errors import CorruptInput, UnsafeInput
from zoo.containers.filenames import (
    ORBAX_CHECKPOINT,
    ORBAX_COMMITTED,
    ORBAX_MANIFEST,
    ORBAX_MARKER,
    ORBAX_TREE,
)
from zoo.containers.orbax_dir.zarr import AGAIN, load_json

_DELETION = "_CHECKPOINT_DELETION"
_TEMPORARY = ".orbax-checkpoint-tmp"
_STEP = re.compile(r"(?:.*_)?(\d{1,18})")
_MAX_JSON = 100_000_000


def is_orbax(path: Path) -> bool:
    """Whether `path` is an Orbax checkpoint or the root of numbered ones, finished or not."""
    try:
        return path.is_dir() and (is_checkpoint(path) or bool(steps_in(path)))
    except OSError:
        return False


def is_checkpoint(path: Path) -> bool:
    """Whether `path` holds a checkpoint, or parts of one, and not only numbered ones."""
    if any(
        (path / name).exists()
        for name in (ORBAX_TREE, ORBAX_CHECKPOINT, ORBAX_MANIFEST, ORBAX_MARKER)
    ):
        return True
    return any(not _STEP.fullmatch(_final_name(item)) for item in trees_in(path))


def trees_in(path: Path) -> list[Path]:
    """The directories in it that have a tree."""
    return sorted(child for child in path.iterdir() if (child / ORBAX_TREE).is_file())


def steps_in(path: Path) -> list[Path]:
    """The numbered checkpoints of a CheckpointManager's root, in the order of their numbers."""
    found = []
    for child in path.iterdir():
        match = _STEP.fullmatch(_final_name(child))
        if match and child.is_dir() and is_checkpoint(child):
            found.append((int(match[1]), child.name, child))
    return [child for *_, child in sorted(found)]


def _final_name(path: Path) -> str:
    return path.name.split(_TEMPORARY)[0]


def unfinished(path: Path) -> str | None:
    """Why the checkpoint at `path` is not complete, or None.

    Where a directory can be renamed, Orbax writes under a temporary name; elsewhere the commit
    file is what says that all was written. Releases before 0.12 wrote no commit file on a local
    disk, so its absence alone says nothing; a start without a commit time does.
    """
    for name in [os.path.basename(os.path.abspath(path)), *(p.name for p in path.iterdir())]:
        if _TEMPORARY in name:
            return f"{name} is a temporary name"
    if (path / _DELETION).exists():
        return "one of its items is being deleted"
    if (path / ORBAX_COMMITTED).exists() or not (path / ORBAX_CHECKPOINT).exists():
        return None
    try:
        meta = read_json(path / ORBAX_CHECKPOINT)
    except CorruptInput:
        return f"{ORBAX_CHECKPOINT} cannot be read"
    if meta.get("init_timestamp_nsecs") and not meta.get("commit_timestamp_nsecs"):
        return f"{ORBAX_CHECKPOINT} has no commit time and there is no {ORBAX_COMMITTED}"
    return None


def survey(checkpoint: Path, root: Path) -> int:
    """Bytes on disk. Raises UnsafeInput for links out of the checkpoint and for special files."""
    inside = checkpoint.resolve()
    if not inside.is_relative_to(root):
        raise _leaves(checkpoint)
    total = 0
    for folder, folders, files in os.walk(checkpoint):
        for name in folders + files:
            path = Path(folder, name)
            if path.is_symlink() and not _target(path).is_relative_to(inside):
                raise _leaves(path)
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                total += status.st_size
            elif not stat.S_ISDIR(status.st_mode):
                raise UnsafeInput(
                    f"{path}: is neither a file nor a directory",
                    "no checkpoint needs that: do not trust it",
                )
    return total


def _target(link: Path) -> Path:
    try:
        return link.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
        raise CorruptInput(f"{link}: is a link to nothing", AGAIN) from None


def _leaves(link: Path) -> UnsafeInput:
    return UnsafeInput(
        f"{link}: is a link that leaves the checkpoint",
        "if you trust it, copy the checkpoint with `cp -rL` and take the copy",
    )


def bytes_below(path: Path) -> int:
    """Of all files below a directory."""
    return sum(
        os.path.getsize(Path(folder, file)) for folder, _, files in os.walk(path) for file in files
    )


def read_small(path: Path) -> bytes | None:
    """A metadata file, or None where there is none. Never one that is not metadata by its size."""
    if not path.is_file():
        return None
    if (size := path.stat().st_size) > _MAX_JSON:
        raise CorruptInput(f"{path}: {size} bytes are not metadata", AGAIN)
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """The same, as a JSON object; CorruptInput where it is not there."""
    raw = read_small(path)
    if raw is None:
        raise CorruptInput(f"{path}: is missing", AGAIN)
    return load_json(raw, str(path))
