"""ONNX files as checkpoints: the initializers of a graph, and its Constant nodes.

Own reader because `onnx.load` holds the whole file, and the library's own rules for external data
have had to be mended four times. The protobuf is scanned once, through a small window; tensors are
read where they lie. Held against the library in the tests.

A graph's tensors are not only weights: exporters leave shapes, indices and scalars among them, and
rename or turn the weights themselves. What is which is for those to say who know the layout
(`zoo.checkpoint.onnx_names`): they call `present`, and from then on the reader has those tensors.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from zoo.containers import dtypes
from zoo.containers.base import TensorInfo, as_array, pread
from zoo.containers.committed import open_file
from zoo.containers.errors import CorruptInput, printable
from zoo.containers.onnx_graph.external import open_beside
from zoo.containers.onnx_graph.messages import Graph, OnnxModel, Parser, Stored
from zoo.containers.onnx_graph.uses import Axes, Use, uses_of
from zoo.containers.onnx_graph.wire import Wire
from zoo.containers.regions import Region, extent, whole
from zoo.containers.spans import Span, SpanReader, Spans

# First bytes: ir_version as a varint, then another field of a ModelProto.
_NEXT = frozenset((0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42, 0x72, 0xA2, 0xCA))


def looks_like(first_bytes: bytes) -> bool:
    """Whether a file that starts like this can be ONNX."""
    start = first_bytes[:3]
    return len(start) == 3 and start[0] == 8 and 0 < start[1] < 64 and start[2] in _NEXT


@dataclass(frozen=True, slots=True)
class Source:
    """What a tensor is made of: a stored one, of which `at` is taken of the first axes; then of
    `of` equal blocks along the first axis those in `blocks`; then its axes in the order `axes`."""

    stored: str
    axes: Axes | None = None
    at: tuple[int, ...] = ()
    of: int = 0
    blocks: tuple[int, ...] = ()

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what is made."""
        made = list(stored[len(self.at) :])
        if self.of:
            made[0] = made[0] // self.of * len(self.blocks)
        return tuple(made[a] for a in self.axes) if self.axes else tuple(made)

    def make(self, x: np.ndarray) -> np.ndarray:
        """The tensor, C-contiguous."""
        x = x[self.at] if self.at else x
        if self.of:
            rest = x.shape[1:]
            x = x.reshape(self.of, -1, *rest)[list(self.blocks)].reshape(-1, *rest)
        return np.asarray(x.transpose(self.axes) if self.axes else x, order="C")


class OnnxReader(SpanReader):
    """One ONNX file. `tensors` are all that it stores, until `present` says which are wanted.

    Text has no place among tensors, nor have elements that share a byte: they are named in a
    notice. Raises CorruptInput for what is not as ONNX has it, UnsafeInput for external data that
    is not in the file's own folder.
    """

    container: ClassVar[str] = "onnx"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.settled = False  # whether `tensors` are those of a model, and not all
        self._fd = open_file(path)
        self._beside: dict[str, int] = {}  # files with external data, by the name that is given
        try:
            model = Parser(Wire(self._fd, path)).model()
            if model.graph is None:
                raise CorruptInput(f"{path}: it has no graph", "give an ONNX model")
            self.graph: Graph = model.graph
            self._collect(model)
        except BaseException:
            self.close()
            raise

    def _collect(self, model: OnnxModel) -> None:
        self.producer = model.producer
        self.metadata = model.metadata
        found: dict[str, Stored] = {}
        for name, tensor in _stored(self.graph):
            if name in found:
                raise CorruptInput(
                    f"{self.path}: two tensors are named {printable(name)}", "export it again"
                )
            found[name] = tensor
        self.uncarried = {n: t.dtype for n, t in found.items() if t.info is None}
        self.stored = {n: t.info for n, t in found.items() if t.info is not None}
        self.tensors = dict(self.stored)
        self._where = {n: t for n, t in found.items() if t.info is not None}
        self._sources = {n: Source(n) for n in self.stored}
        self.uses: dict[str, list[Use]] = uses_of(
            self.graph, {n: len(i.shape) for n, i in self.stored.items()}
        )
        self._check_external()
        if self.uncarried:
            some = ", ".join(f"{n} ({d})" for n, d in list(self.uncarried.items())[:3])
            self.notices.append(f"of dtypes that are not carried, not read: {some}")

    def _check_external(self) -> None:
        """Every file that is named, opened, and every place in it."""
        ends: dict[str, int] = {}
        for t in self._where.values():
            if t.external is not None and t.info is not None:
                end = t.external.offset + t.info.nbytes
                ends[t.external.location] = max(end, ends.get(t.external.location, 0))
        for location, end in ends.items():
            self._beside[location] = open_beside(self.path, location)
            size = os.fstat(self._beside[location]).st_size
            if size < end:
                raise CorruptInput(
                    f"{self.path}: {printable(location)} has {size} bytes, and {end} are needed",
                    "it is truncated: copy or download it again",
                )

    def present(self, sources: Mapping[str, Source]) -> None:
        """From here on the tensors are these, by these names."""
        self._sources = dict(sources)
        self.tensors = {}
        for name, source in sources.items():
            info = self.stored[source.stored]
            self.tensors[name] = TensorInfo(info.dtype, source.shape(info.shape))

    def present_stored(self, names: Iterable[str]) -> None:
        """From here on the tensors are those of these names that it stores, as they are stored."""
        self.present({n: Source(n) for n in names if n in self.stored})

    def made_of(self, name: str) -> Source:
        """What one of the tensors is made of."""
        return self._sources[name]

    def descriptor(self, file: str) -> int | None:
        return self._beside.get(file, self._fd)

    def file_of(self, file: str) -> Path:
        return self.path.parent / file if file else self.path

    def spans(self, name: str) -> Spans | None:
        source = self._sources[name]
        stored = self._where[source.stored]
        plain = source == Source(source.stored) and not stored.varints
        return _spans(stored) if plain else None

    def read(
        self, name: str, region: Region | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        info, source = self.tensors[name], self._sources[name]
        region = whole(info.shape) if region is None else region
        if self.spans(name) is not None:
            return super().read(name, region, out)
        made = source.make(self._whole(self._where[source.stored]))[region]
        if out is None:
            out = np.empty(extent(region), made.dtype)
        out[...] = made
        return out

    def _whole(self, stored: Stored) -> np.ndarray:
        assert stored.info is not None
        info, what = stored.info, f"{self.path}: {printable(stored.name)}"
        spans = _spans(stored)
        raw = np.empty(sum(s.nbytes for s in spans), np.uint8)
        done = 0
        for s in spans:
            fd = self._beside[s.file] if s.file else self._fd
            raw[done : done + s.nbytes] = pread(fd, s.nbytes, s.offset, what)
            done += s.nbytes
        return as_array(_numbers(raw, info, what) if stored.varints else raw, info)

    def state(self) -> object:
        found = [os.fstat(fd) for fd in (self._fd, *self._beside.values())]
        return [(status.st_size, status.st_mtime_ns) for status in found]

    def close(self) -> None:
        while self._beside:
            os.close(self._beside.popitem()[1])
        super().close()


def _spans(stored: Stored) -> Spans:
    """Where a stored tensor's bytes lie, one after the other."""
    assert stored.info is not None
    if stored.external is not None:
        place = stored.external
        return [Span(place.offset, stored.info.nbytes, place.location)]
    return [Span(start, end - start) for start, end in stored.spans]


def _stored(graph: Graph) -> Iterator[tuple[str, Stored]]:
    """The tensors of a graph and of those within it, Constant nodes by the name of their result."""
    yield from graph.stored.items()
    for node in graph.nodes:
        if node.op == "Constant" and "value" in node.tensors and node.outputs:
            yield node.outputs[0], node.tensors["value"]
        for inner in node.graphs:
            yield from _stored(inner)


def _numbers(raw: np.ndarray, info: TensorInfo, what: str) -> np.ndarray:
    """Varints as the bytes of the tensor that they are the elements of; narrow dtypes keep their
    bits in the lowest of each number."""
    last = np.flatnonzero(raw < 0x80)
    if len(last) != math.prod(info.shape) or (len(raw) and last[-1] != len(raw) - 1):
        raise CorruptInput(
            f"{what}: {len(last)} values are there, {info.size} are due", "export it again"
        )
    first = np.concatenate(([0], last[:-1] + 1)) if len(last) else last
    length = last - first + 1
    if len(length) and length.max() > 10:
        raise CorruptInput(f"{what}: a number does not end", "export it again")
    values = np.zeros(len(last), np.uint64)
    for i in range(int(length.max()) if len(length) else 0):
        here = np.flatnonzero(length > i)
        part = (raw[first[here] + i] & 0x7F).astype(np.uint64)
        values[here] |= part << np.uint64(7 * i)
    width = dtypes.itemsize(info.dtype)
    narrow = values.astype({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[width])
    return narrow.view(np.uint8)
