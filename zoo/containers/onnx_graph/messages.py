"""What an ONNX file says, as data: its graph, and where the bytes of each stored tensor lie.

The numbers are those of the fields in onnx.proto; what has no number here is stepped over.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from zoo.containers import dtypes
from zoo.containers.base import TensorInfo
from zoo.containers.errors import CorruptInput, printable
from zoo.containers.onnx_graph.wire import FIXED32, FIXED64, LENGTH, VARINT, Span, Wire, signed

_MAX_DEPTH = 64  # of graphs in graphs
_MAX_DIMS = 64
_FEW = 64  # numbers of an attribute that are kept
_NESTED = re.compile(r"'((?:[^'\\]|\\.)*)'")
_SCOPES = "pkg.torch.onnx.name_scopes"

# TensorProto.DataType -> our code. Text has none, nor has what packs several elements in a byte.
_DTYPES = {
    **{1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 9: "BOOL"},
    **{10: "F16", 11: "F64", 12: "U32", 13: "U64", 14: "C64", 15: "C128", 16: "BF16"},
    **{17: "F8_E4M3", 18: "F8_E4M3FNUZ", 19: "F8_E5M2", 20: "F8_E5M2FNUZ", 24: "F8_E8M0"},
}
_OTHERS = {8: "STRING", 21: "UINT4", 22: "INT4", 23: "FLOAT4E2M1", 25: "UINT2", 26: "INT2"}

# Typed fields of a TensorProto: number -> the dtypes that are kept there, wire type of one element.
_TYPED = {
    4: ("F32 C64", FIXED32),
    5: ("I32 I16 I8 U16 U8 BOOL F16 BF16 F8_E4M3 F8_E4M3FNUZ F8_E5M2 F8_E5M2FNUZ F8_E8M0", VARINT),
    7: ("I64", VARINT),
    10: ("F64 C128", FIXED64),
    11: ("U32 U64", VARINT),
}


@dataclass(frozen=True, slots=True)
class External:
    """Where in another file the bytes lie: its name as the file states it, and the place."""

    location: str
    offset: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in the file. `info` is None where its dtype is none that we carry (`dtype`).

    `spans` are the pieces of its bytes, of varints where `varints`; where they lie in another file
    `external` says so.
    """

    name: str
    info: TensorInfo | None
    dtype: str
    spans: tuple[Span, ...] = ()
    varints: bool = False
    external: External | None = None


@dataclass(slots=True)
class Node:
    """One operation. `scope` is the path of the torch module that it was exported from, where the
    exporter says so apart from the name."""

    op: str = ""
    domain: str = ""
    name: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    ints: dict[str, tuple[int, ...]] = field(default_factory=dict)
    floats: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, Stored] = field(default_factory=dict)
    graphs: list[Graph] = field(default_factory=list)
    scope: str | None = None


@dataclass(slots=True)
class Graph:
    """Operations in order, each after those whose results it takes."""

    nodes: list[Node] = field(default_factory=list)
    stored: dict[str, Stored] = field(default_factory=dict)  # initializers
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    sparse: int = 0


@dataclass(slots=True)
class OnnxModel:
    """The whole file."""

    graph: Graph | None = None
    producer: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    functions: int = 0  # operations that the file defines itself; their bodies are not looked into


class Parser:
    """Reads the messages of one file. Whatever it cannot understand is CorruptInput."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def model(self) -> OnnxModel:
        """The file, which is one ModelProto."""
        made = OnnxModel()
        for number, span in self._parts(self._wire.whole()):
            if number == 2:
                made.producer = self._wire.text(span)
            elif number == 7:
                if made.graph is not None:
                    self._wire.fail("it has two graphs")
                made.graph = self._graph(span, frozenset(), 0)
            elif number == 14:
                made.metadata |= [self._pair(span)]
            elif number == 25:
                made.functions += 1
        return made

    def _parts(self, message: Span) -> Iterator[tuple[int, Span]]:
        """The fields of a message that have a length."""
        for number, kind, _, span in self._wire.fields(message):
            if kind == LENGTH:
                yield number, span

    def _pair(self, span: Span) -> tuple[str, str]:
        found = {number: self._wire.text(inner) for number, inner in self._parts(span)}
        return found.get(1, ""), found.get(2, "")

    def _graph(self, span: Span, outer: frozenset[str], depth: int) -> Graph:
        if depth > _MAX_DEPTH:
            self._wire.fail(f"graphs are nested more than {_MAX_DEPTH} deep")
        made, nodes = Graph(), []
        for number, part in self._parts(span):
            if number == 1:
                nodes.append(part)
            elif number == 5:
                tensor = self.tensor(part)
                if tensor.name in made.stored:
                    self._wire.fail(f"two tensors are named {printable(tensor.name)}")
                made.stored[tensor.name] = tensor
            elif number in (11, 12):
                (made.inputs if number == 11 else made.outputs).append(self._first_text(part))
            elif number == 15:
                made.sparse += 1
        known = set(outer) | set(made.stored) | set(made.inputs) | {""}
        for part in nodes:
            node = self._node(part, known, depth)
            made.nodes.append(node)
            known |= set(node.outputs)
        if missing := [n for n in made.outputs if n not in known]:
            self._wire.fail(f"nothing makes its output {printable(missing[0])}")
        return made

    def _first_text(self, span: Span) -> str:
        return next((self._wire.text(s) for number, s in self._parts(span) if number == 1), "")

    def _node(self, span: Span, known: set[str], depth: int) -> Node:
        node, inner = Node(), []
        for number, part in self._parts(span):
            if number == 1:
                node.inputs.append(self._wire.text(part))
            elif number == 2:
                node.outputs.append(self._wire.text(part))
            elif number == 3:
                node.name = self._wire.text(part)
            elif number == 4:
                node.op = self._wire.text(part)
            elif number == 5:
                inner.append(part)
            elif number == 7:
                node.domain = self._wire.text(part)
            elif number == 9 and node.scope is None:
                node.scope = self._scope(part)
        who = printable(node.name or node.op)
        for name in node.inputs:
            if name not in known:
                self._wire.fail(
                    f"the operation {who} takes {printable(name)}, which nothing before it makes"
                )
        for name in node.outputs:
            if name and name in known:
                self._wire.fail(f"the operation {who} makes {printable(name)} a second time")
        for part in inner:
            self._attribute(node, part, known, depth)
        return node

    def _scope(self, span: Span) -> str | None:
        """The module's path, of a node's metadata."""
        key = value = None
        for number, part in self._parts(span):
            if number == 1:
                key = self._wire.text(part)
            elif number == 2 and key == _SCOPES:
                value = self._wire.text(part)
        if value is None:
            return None
        parts = _NESTED.findall(value)
        return parts[-2] if len(parts) > 1 else None

    def _attribute(self, node: Node, span: Span, known: set[str], depth: int) -> None:
        name = ""
        numbers: list[int] = []
        for number, kind, value, part in self._wire.fields(span):
            if number == 1 and kind == LENGTH:
                name = self._wire.text(part)
            elif number == 2 and kind == FIXED32:
                node.floats[name] = self._wire.float32(part)
            elif number in (3, 8) and kind == VARINT and len(numbers) < _FEW:
                numbers.append(signed(value))
            elif number == 8 and kind == LENGTH and part[1] - part[0] <= 10 * _FEW:
                numbers += self._wire.packed(part, 10 * _FEW)
            elif number == 5 and kind == LENGTH:
                node.tensors[name] = self.tensor(part)
            elif number in (6, 11) and kind == LENGTH:
                node.graphs.append(self._graph(part, frozenset(known), depth + 1))
        if numbers:
            node.ints[name] = tuple(numbers)

    def tensor(self, span: Span) -> Stored:
        """A TensorProto, whose bytes are not read."""
        name, code, elsewhere = "", 0, False
        external: dict[str, str] = {}
        dims: list[int] = []
        held: dict[int, list[tuple[int, Span]]] = {}
        for number, kind, value, part in self._wire.fields(span):
            if number == 1 and kind == VARINT:
                dims.append(signed(value))
            elif number == 1 and kind == LENGTH:
                dims += self._wire.packed(part, _MAX_DIMS)
            elif number == 2 and kind == VARINT:
                code = value
            elif number == 8 and kind == LENGTH:
                name = self._wire.text(part)
            elif number == 13 and kind == LENGTH:
                external |= [self._pair(part)]
            elif number == 14 and kind == VARINT:
                elsewhere = value == 1
            elif number in (*_TYPED, 6, 9):
                held.setdefault(number, []).append((kind, part))
            if len(dims) > _MAX_DIMS:
                self._wire.fail(f"a tensor has more than {_MAX_DIMS} axes")
        what = printable(name) or "a tensor"
        if code in _OTHERS:
            return Stored(name, None, _OTHERS[code])
        if code not in _DTYPES:
            self._wire.fail(f"{what} has the dtype {code}, which ONNX does not know")
        info = TensorInfo(_DTYPES[code], tuple(dims))
        size = math.prod(max(n, 1) for n in dims) * dtypes.itemsize(info.dtype)
        if size >= 1 << 63 or min(dims, default=0) < 0:
            self._wire.fail(f"{what} has the shape {info.shape}")
        if elsewhere or external:
            if held:
                self._wire.fail(f"{what} has its bytes both here and in another file")
            return Stored(name, info, info.dtype, external=self._external(what, info, external))
        return self._spans(what, name, info, held)

    def _external(self, what: str, info: TensorInfo, told: dict[str, str]) -> External:
        try:
            offset, length = int(told.get("offset", "0")), int(told.get("length", info.nbytes))
        except ValueError:
            self._wire.fail(f"{what} lies in another file at a place that is not a number")
        if offset < 0 or length != info.nbytes:
            self._wire.fail(
                f"{what} is {info.dtype} {info.shape}, which needs {info.nbytes} bytes, "
                f"and has {length} at byte {offset} of another file"
            )
        if not told.get("location"):
            self._wire.fail(f"{what} lies in another file that is not named")
        return External(told["location"], offset)

    def _spans(
        self, what: str, name: str, info: TensorInfo, held: dict[int, list[tuple[int, Span]]]
    ) -> Stored:
        """Where the bytes of a tensor lie that are in this file."""
        if len(held) > 1:
            self._wire.fail(f"{what} has its values twice")
        number, parts = next(iter(held.items()), (9, []))
        spans = tuple(part for _, part in parts)
        nbytes = sum(end - start for start, end in spans)
        if number == 9:
            if len(spans) > 1 or nbytes != info.nbytes:
                self._short(what, info, nbytes)
            return Stored(name, info, info.dtype, spans)
        kinds, one = _TYPED.get(number, ("", VARINT))
        if info.dtype not in kinds.split() or not {k for k, _ in parts} <= {one, LENGTH}:
            self._wire.fail(f"{what} is {info.dtype}, and its values are not kept as those are")
        if one != VARINT and nbytes != info.nbytes:
            self._short(what, info, nbytes)
        if one == VARINT and not info.size <= nbytes <= 10 * info.size:
            self._short(what, info, nbytes)
        return Stored(name, info, info.dtype, spans, varints=one == VARINT)

    def _short(self, what: str, info: TensorInfo, nbytes: int) -> None:
        raise CorruptInput(
            f"{what} is {info.dtype} {info.shape}, which needs {info.nbytes} bytes, "
            f"and {nbytes} are there",
            "it is damaged or was written wrongly: copy or download it again",
        )
