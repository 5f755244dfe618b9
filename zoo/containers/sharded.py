"""Checkpoints in several files, with an index that says which tensor is where.

The index is the authority, as in the Hugging Face formats that it comes from: files beside it
that it does not name are not read, and whatever it names has to be there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import ClassVar, TypeVar

import numpy as np

from zoo.containers import filenames
from zoo.containers.base import Reader, TensorInfo, Writer, fsync
from zoo.containers.errors import CorruptInput, UnsafeInput, UsageError
from zoo.containers.regions import Region
from zoo.containers.safetensors_file import (
    SafetensorsWriter,
    check_tensors,
    in_file,
    parse_json,
)
from zoo.containers.spans import Span, SpanReader, Spans

_MAX_INDEX = 100_000_000
_T = TypeVar("_T")


class ShardedReader(SpanReader):
    """All shards of a `*.index.json`, as one checkpoint in the order of the index.

    `open_shard` opens one of them. `container` is that of the shards. Of their metadata and
    extras it has what no two shards contradict.
    """

    container: ClassVar[str] = "safetensors"

    def __init__(self, path: Path, open_shard: Callable[[Path], Reader]) -> None:
        super().__init__(path)
        self._where = _weight_map(path)
        self._shards: dict[str, Reader] = {}
        problems = []
        try:
            for shard in dict.fromkeys(self._where.values()):
                # A symlink is fine: the Hugging Face cache consists of them.
                if shard.endswith(filenames.INDEX):
                    problems.append(f"{shard} is an index itself")
                elif os.path.isfile(path.parent / shard):
                    self._shards[shard] = open_shard(path.parent / shard)
                else:
                    problems.append(f"there is no file {shard}")
            self._where = {self._spelling(n): shard for n, shard in self._where.items()}
            problems += self._differences()
            if problems:
                raise CorruptInput(
                    f"{path} does not fit its shards: {'; '.join(problems)}",
                    "copy or download the whole checkpoint again",
                )
            self._merge()
        except BaseException:
            self.close()
            raise

    def _spelling(self, name: str) -> str:
        """The shard's name for what the index calls `name`.

        transformers 4 joined the keys of Flax's trees with slashes in its indexes.
        """
        shard = self._shards.get(self._where[name])
        dotted = name.replace("/", ".")
        if shard and shard.container == "msgpack" and name not in shard.tensors:
            return dotted if dotted in shard.tensors else name
        return name

    def _differences(self) -> list[str]:
        problems = [
            f"{name} is not in {shard}"
            for name, shard in self._where.items()
            if shard in self._shards and name not in self._shards[shard].tensors
        ]
        problems += [
            f"{name} is in {shard}, of which the index knows nothing"
            for shard, reader in self._shards.items()
            for name in reader.tensors
            if self._where.get(name) != shard
        ]
        kinds = sorted({reader.container for reader in self._shards.values()})
        return problems + ([f"the shards are of several kinds, {kinds}"] if len(kinds) > 1 else [])

    def _merge(self) -> None:
        shards = self._shards.values()
        for reader in shards:
            # The class cannot know it: an index is the same for every container.
            self.container = reader.container  # type: ignore[misc]
            self.ties |= reader.ties
            self.notices += [n for n in reader.notices if n not in self.notices]
        self.tensors = {n: self._shards[shard].tensors[n] for n, shard in self._where.items()}
        self.metadata = _agreed(reader.metadata for reader in shards)
        self.extras = _agreed(reader.extras for reader in shards)

    def spans(self, name: str) -> Spans | None:
        """Where the tensor lies; the files are beside the index."""
        shard = self._where[name]
        reader = self._shards[shard]
        found = reader.spans(name) if isinstance(reader, SpanReader) else None
        return None if found is None else [Span(s.offset, s.nbytes, shard) for s in found]

    def file_of(self, file: str) -> Path:
        """The shard's path."""
        return self.path.parent / file

    def descriptor(self, file: str) -> int | None:
        """The shard's."""
        shard = self._shards[file]
        return shard.descriptor("") if isinstance(shard, SpanReader) else None

    def vouch(self, name: str) -> None:
        shard = self._shards[self._where[name]]
        if isinstance(shard, SpanReader):
            shard.vouch(name)

    def read(
        self, name: str, region: Region | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        return self._shards[self._where[name]].read(name, region, out)

    def state(self) -> object:
        return [reader.state() for reader in self._shards.values()]

    def close(self) -> None:
        for reader in self._shards.values():
            reader.close()


def _weight_map(path: Path) -> dict[str, str]:
    """Which tensor is in which file beside the index `path`."""
    with path.open("rb") as file:
        raw = file.read(_MAX_INDEX + 1)
    if len(raw) > _MAX_INDEX:
        raise CorruptInput(
            f"{path} has more than {_MAX_INDEX} bytes, no index needs them",
            "check where it is from",
        )
    found = parse_json(raw, str(path)).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise CorruptInput(
            f"{path}: weight_map is not a map of tensor names to file names",
            "it is damaged or no index of a checkpoint: copy or download it again",
        )
    if not found:
        raise CorruptInput(f"{path}: weight_map is empty", "copy or download it again")
    strange = [shard for shard in dict.fromkeys(found.values()) if not _is_plain(shard)]
    if strange:
        raise UnsafeInput(
            f"{path} names shards that are not plain file names: {', '.join(map(repr, strange))}",
            "a checkpoint's shards lie beside its index: do not use this one",
        )
    return found


def _is_plain(name: str) -> bool:
    """Whether `name` is a file of the same directory, on this and on other systems."""
    return name not in ("", "..") and "\0" not in name and PureWindowsPath(name).name == name


def _agreed(dicts: Iterable[Mapping[str, _T]]) -> dict[str, _T]:
    """All entries, less those whose values differ between two of the dicts."""
    merged: dict[str, _T] = {}
    differing = set()
    for items in dicts:
        for key, value in items.items():
            if merged.setdefault(key, value) != value:
                differing.add(key)
    return {key: value for key, value in merged.items() if key not in differing}


class ShardedSafetensorsWriter(Writer):
    """A directory of safetensors shards of at most `max_shard_size` bytes of tensors, and an index.

    Shards fill up in the header's order, as huggingface_hub's do; a larger tensor gets one of
    its own. What fits one file is one, without an index. A shard is opened by its first tensor
    and closed by its last, so that few are open where tensors come about in order.
    """

    container: ClassVar[str] = "safetensors"

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, TensorInfo],
        metadata: Mapping[str, str],
        max_shard_size: int,
        resumed: bool = False,
    ) -> None:
        super().__init__(path, tensors, metadata)
        if max_shard_size < 1:
            raise UsageError(
                f"a shard cannot have {max_shard_size} bytes", "give a size of at least one byte"
            )
        check_tensors(self.tensors)
        shards = _split(self.tensors, max_shard_size)
        if len(shards) == 1:
            self._shards = {filenames.SAFETENSORS: shards[0]}
        else:
            self._shards = {
                filenames.shard(i, len(shards)): shard for i, shard in enumerate(shards, 1)
            }
        self._where = {n: file for file, shard in self._shards.items() for n in shard}
        self._missing = {
            file: sum(max(1, info.size) for info in shard.values())
            for file, shard in self._shards.items()
        }
        order = [
            sorted(shard, key=lambda n: in_file(n, self.tensors[n]))
            for shard in self._shards.values()
        ]
        self._place = {name: i for names in order for i, name in enumerate(names)}
        self._open: dict[str, SafetensorsWriter] = {}
        self._resumed = resumed
        path.mkdir(exist_ok=resumed)

    def place(self, name: str) -> tuple[str, int]:
        return self._where[name], self._place[name]

    def _write(self, name: str, array: np.ndarray, region: Region) -> None:
        self._writer(self._where[name]).write(name, array, region)

    def _copy(self, name: str, reader: Reader, source: str, region: Region) -> bool:
        return self._writer(self._where[name]).copy(name, reader, source, region)

    def _skip(self, name: str, region: Region) -> None:
        self._writer(self._where[name]).skip(name, region)

    def _wrote(self, name: str, elements: int) -> None:
        file = self._where[name]
        with self._lock:
            self._missing[file] -= max(1, elements)
            last = not self._missing[file]
        if last:
            self._close(file)

    def _writer(self, file: str) -> SafetensorsWriter:
        with self._lock:
            if file not in self._open:
                path = self.path / file
                self._open[file] = SafetensorsWriter(
                    path, self._shards[file], self.metadata, self._resumed
                )
            return self._open[file]

    def _close(self, file: str) -> None:
        """A shard that has all of its tensors; it is synced with the others."""
        with self._writer(file) as writer:
            writer.complete()
        with self._lock:
            del self._open[file]

    def _complete(self) -> None:
        if not self.tensors:
            self._close(filenames.SAFETENSORS)
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": sum(t.nbytes for t in self.tensors.values())},
                "weight_map": self._where,
            }
            with (self.path / filenames.SAFETENSORS_INDEX).open("w") as file:
                file.write(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def sync(self) -> None:
        for file in self.path.iterdir():
            fsync(file)
        fsync(self.path)

    def close(self) -> None:
        for writer in self._open.values():
            writer.close()


def _split(tensors: Mapping[str, TensorInfo], max_size: int) -> list[dict[str, TensorInfo]]:
    """The shards, in huggingface_hub's order: one too large for any precedes the one it meets."""
    shards: list[dict[str, TensorInfo]] = []
    current: dict[str, TensorInfo] = {}
    room = max_size
    for name, info in tensors.items():
        if info.nbytes > max_size:
            shards.append({name: info})
            continue
        if info.nbytes > room:
            shards.append(current)
            current, room = {}, max_size
        current[name] = info
        room -= info.nbytes
    return [*shards, current] if current or not shards else shards
