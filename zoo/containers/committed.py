"""Which files are of one generation: the readers' side of a commit.

A checkpoint that is one file has others beside it, and no file system renames several at once. So a
commit renames a directory that holds all of them, and a list of their names, to `place`: the one
step from old to new. Then it moves each to where it belongs. Where that was cut short, the next
conversion or `clean` goes on; readers change nothing, and find each file where it lies by then.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from zoo.containers import filenames, json_text
from zoo.containers.errors import CorruptInput, UnsafeInput

JOURNAL = "journal.json"
_LARGEST = 1 << 16  # bytes of a journal
_TRIES = 3  # a commit may move a file between a look and its opening


def place(checkpoint: Path) -> Path:
    """Where the files of a checkpoint wait, once they are its own."""
    return checkpoint.with_name(f".{checkpoint.name}{filenames.WORKPLACE}committed")


def listed(checkpoint: Path) -> frozenset[str] | None:
    """The names of all files of the generation that is being put in its place, moved or not; None
    where none is."""
    if checkpoint.name in ("", ".."):
        return None
    journal = place(checkpoint) / JOURNAL
    try:
        names = json_text.read(journal, _LARGEST)["files"]
        sound = isinstance(names, list) and all(
            filenames.belongs(n, checkpoint.name) for n in names
        )
    except OSError as e:
        if e.errno in (errno.EMFILE, errno.ENFILE, errno.EIO):
            raise
        return None
    except (ValueError, TypeError, KeyError, AttributeError):
        sound = False
    if not sound:
        raise CorruptInput(
            f"{journal} does not say which files are {checkpoint.name}'s",
            f"remove {journal.parent}, and convert the checkpoint again",
        )
    here = journal.parent
    if linked := [p for p in (here, *(here / n for n in names)) if p.is_symlink()]:
        raise UnsafeInput(
            f"{linked[0]} is a link, which no conversion leaves",
            f"remove {here}, and convert the checkpoint again",
        )
    return frozenset(names)


def find(path: Path, checkpoint: Path | None = None) -> Path:
    """Where the file called `path` lies, which belongs to `checkpoint` (itself, where none is
    given). What that no longer has is looked for where nothing is."""
    of = path if checkpoint is None else checkpoint
    names = listed(of)
    if names is None or not filenames.belongs(path.name, of.name):
        return path
    waiting = place(of) / path.name
    return waiting if path.name not in names or os.path.lexists(waiting) else path


def beside(checkpoint: Path, name: str) -> Path:
    """Where what belongs to a checkpoint lies: in the directory, or as FILE.name."""
    if find(checkpoint).is_dir():
        return checkpoint / name
    return find(checkpoint.with_name(f"{checkpoint.name}.{name}"), checkpoint)


def open_file(path: Path) -> int:
    """A descriptor of the checkpoint that is one file, for reading."""
    for _ in range(_TRIES):
        try:
            return os.open(find(path), os.O_RDONLY)
        except FileNotFoundError:
            pass
    return os.open(path, os.O_RDONLY)
