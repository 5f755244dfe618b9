"""What a disk may hold after the power was cut: a run is recorded, and then lost in parts.

The recorder looks at a folder before and after each call that changes the disk, and notes what was
made durable: a file's bytes by fsync of the file, names by fsync of their directory, and nothing
else. So it sees every write, whoever made it. `left` then builds what the disk may be left with at
some moment: of a file's blocks, each is the one that was synced or any that was written since; of
the changes of names that were not synced, a first part (as a journal keeps them) or any of them.
A rename is one change, and so is an exchange.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 4096
Names = dict[tuple[int, str], int]  # (directory, name) -> what is called so there
Change = list[tuple[int, str, int | None]]  # one step: (directory, name, what is there from now on)


@dataclass
class Disk:
    """What was recorded. Files and directories have numbers; the folder itself is number 0."""

    first: Names = field(default_factory=dict)
    changes: list[tuple[int, Change]] = field(default_factory=list)  # at which moment
    versions: dict[int, list[tuple[int, bytes]]] = field(default_factory=dict)  # of files
    synced: list[tuple[int, int]] = field(default_factory=list)  # at which moment, and what
    moments: int = 0


class Recorder:
    """Looks at a folder; `hook` puts it around the calls that change the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.disk = folder, Disk()
        self._lock = threading.Lock()
        self._numbers: dict[tuple[int, int], int] = {}
        self._held: list[int] = []  # descriptors: no inode is used again meanwhile
        self._names: Names = {}
        self._number(folder)
        self.look()
        self.disk.first, self.disk.changes = dict(self._names), []
        self.disk.synced = [(self.disk.moments, n) for n in self._numbers.values()]

    def hook(self, names: tuple[str, ...]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Look after each of these calls of `os`; and before a sync, which makes durable what was
        there when it began. Gives what does the same for another function."""

        def hooked(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **told: Any) -> Any:
                result = real(*args, **told)
                self.look()
                return result

            return call

        for name in names:
            if name != "fsync":
                setattr(os, name, hooked(getattr(os, name)))
        real = os.fsync

        def fsync(fd: int) -> None:
            status = os.fstat(fd)
            seen = self.look()
            real(fd)
            number = self._numbers.get((status.st_dev, status.st_ino))
            with self._lock:
                if number is not None:
                    self.disk.synced.append((seen, number))

        os.fsync = fsync
        return hooked

    def look(self) -> int:
        """Note what is other than it was; the moment."""
        with self._lock:
            self.disk.moments += 1
            found: Names = {}
            self._walk(self.folder, 0, found)
            if change := [
                (*at, found.get(at))
                for at in {**self._names, **found}
                if self._names.get(at) != found.get(at)
            ]:
                self.disk.changes += [(self.disk.moments, one) for one in self._apart(change)]
            self._names = found
            return self.disk.moments

    def _walk(self, folder: Path, number: int, found: Names) -> None:
        try:
            entries = sorted(os.scandir(folder), key=lambda e: e.name)
        except FileNotFoundError:  # another thread removed it
            return
        for entry in entries:
            path = folder / entry.name
            try:
                of = self._number(path)
                found[number, entry.name] = of
                if entry.is_dir():
                    self._walk(path, of, found)
                else:
                    self._content(path, of)
            except FileNotFoundError:
                found.pop((number, entry.name), None)

    def _number(self, path: Path) -> int:
        status = path.stat()
        at = status.st_dev, status.st_ino
        if at not in self._numbers:
            self._held.append(os.open(path, os.O_RDONLY))
            self._numbers[at] = len(self._numbers)
        return self._numbers[at]

    def _content(self, path: Path, number: int) -> None:
        data = path.read_bytes()
        seen = self.disk.versions.setdefault(number, [])
        if not seen or seen[-1][1] != data:
            seen.append((self.disk.moments, data))

    def _apart(self, change: Change) -> list[Change]:
        """Changes that have nothing to do with each other are several."""
        groups: list[tuple[set[int], Change]] = []
        for one in change:
            mine = {n for n in (self._names.get(one[:2]), one[2]) if n is not None}
            same = [g for g in groups if g[0] & mine]
            groups = [g for g in groups if g not in same]
            groups.append(
                (mine.union(*(g[0] for g in same)), [one, *(c for g in same for c in g[1])])
            )
        return [changes for _, changes in groups]


def left(disk: Disk, moment: int, rng: random.Random) -> dict[str, bytes | None]:
    """The files (None: directories) that a disk may hold when the power is cut at a moment."""
    synced: dict[int, int] = {}  # until when
    for at, number in disk.synced:
        if at <= moment:
            synced[number] = max(at, synced.get(number, 0))
    happened = [(at, change) for at, change in disk.changes if at <= moment]
    sure = [any(at <= synced.get(d, -1) for d, _, _ in change) for at, change in happened]
    if rng.random() < 0.5:  # in order, as a journal has them
        last = max((i for i, s in enumerate(sure) if s), default=-1)
        upto = rng.randint(last, len(happened) - 1) if happened else 0
        kept = [change for i, (_, change) in enumerate(happened) if i <= upto]
    else:
        odds = rng.choice((0.0, 0.5, 0.9))
        kept = [c for s, (_, c) in zip(sure, happened, strict=True) if s or rng.random() < odds]
    names = dict(disk.first)
    for change in kept:
        for folder, name, number in change:
            if number is None:
                names.pop((folder, name), None)
        for folder, name, number in change:
            if number is not None:
                for other in [at for at, n in names.items() if n == number]:
                    del names[other]  # nothing has two names
                names[folder, name] = number
    found: dict[str, bytes | None] = {}
    _tree(disk, names, 0, "", synced, moment, rng, found)
    return found


def _tree(
    disk: Disk,
    names: Names,
    folder: int,
    path: str,
    synced: dict[int, int],
    moment: int,
    rng: random.Random,
    found: dict[str, bytes | None],
) -> None:
    for (parent, name), number in sorted(names.items()):
        if parent != folder:
            continue
        at = f"{path}{name}"
        if number in disk.versions:
            found[at] = _bytes(disk.versions[number], synced.get(number, -1), moment, rng)
        else:
            found[at] = None
            _tree(disk, names, number, f"{at}/", synced, moment, rng, found)


def _bytes(
    versions: list[tuple[int, bytes]], synced: int, moment: int, rng: random.Random
) -> bytes:
    """Of what was synced and what was written since, each block one of them."""
    base = b"".join([data for at, data in versions if at <= synced][-1:])
    later = [data for at, data in versions if synced < at <= moment]
    if not later:
        return base
    choice = rng.random()
    if choice < 0.2:
        return base
    if choice < 0.4:
        return later[-1]
    size = len(rng.choice([base, *later]))
    made = bytearray()
    for start in range(0, size, BLOCK):
        of = rng.choice([base, *later, later[-1]])
        made += of[start : start + BLOCK].ljust(min(BLOCK, size - start), b"\0")
    return bytes(made[:size])


def write(found: dict[str, bytes | None], folder: Path) -> None:
    """Make a folder that holds this and nothing else."""
    folder.mkdir()
    for name, data in found.items():
        if data is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data)
