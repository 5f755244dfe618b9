"""msgpack as `flax.serialization` writes it: nested maps, arrays in extension types.

The file has no table of contents, so the reader walks it once and remembers where each array's
bytes lie; of those it reads none until asked. The writer knows from the header alone where
everything goes. Own scanner (`scan`) because the msgpack package wants the whole file
in memory. Held against flax in tests.

An array is extension type 1, whose data is again msgpack: `[shape, dtype name, bytes]`. NumPy
scalars are the same under type 3, complex numbers two floats under type 2. Arrays above 1 GiB
are cut into one-dimensional chunks: `{"__msgpack_chunked_array__": True, "shape": {"0": n, ...},
"chunks": {"0": array, ...}}`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from zoo.containers import dtypes
from zoo.containers.base import TensorInfo, put
from zoo.containers.committed import open_file
from zoo.containers.errors import CorruptInput, UsageError
from zoo.containers.flax_msgpack.scan import CHUNKED, MAX_DEPTH, NDARRAY, Array, Scanner
from zoo.containers.spans import Span, SpanReader, SpanWriter

MAX_CHUNK_SIZE = 2**30  # bytes; flax's own


def looks_like(first_bytes: bytes) -> bool:
    """Whether a file that starts like this can be flax's: a map whose first key is a string.

    A pickle starts as an empty map would, a safetensors file may start as any map; neither is
    taken for one. Give at least 9 bytes, where the file has them.
    """
    if first_bytes[4:9] == b"\0\0\0\0{":  # safetensors: the upper half of its header's length
        return False
    match first_bytes[:1]:
        case b"\xde":
            key = first_bytes[3:4]
        case b"\xdf":
            key = first_bytes[5:6]
        case first if b"\x81" <= first <= b"\x8f":
            key = first_bytes[1:2]
        case _:
            return False
    return b"\xa0" <= key <= b"\xbf" or key in (b"\xd9", b"\xda", b"\xdb")


class MsgpackReader(SpanReader):
    """One file of `flax.serialization.to_bytes` or `msgpack_serialize`.

    Keys are joined with dots, integer keys and the places in a list written as decimals. What
    is not an array, an empty map included, is in `extras` under the same kind of name.
    """

    container: ClassVar[str] = "msgpack"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._fd = open_file(path)
        try:
            self._collect(Scanner(self._fd, path).root())
        except BaseException:
            self.close()
            raise

    def _collect(self, root: dict[str, Any]) -> None:
        for name, value in _leaves(root):
            if name in self.tensors or name in self.extras:
                raise CorruptInput(
                    f"{self.path}: two things are named {name} once keys are joined with dots",
                    "rename one of them where the file was written",
                )
            if isinstance(value, Array):
                self.tensors[name] = value.info
                self._spans[name] = tuple(Span(*span) for span in value.spans)
            else:
                self.extras[name] = value


def _leaves(tree: Any, name: str | None = None) -> Iterator[tuple[str, Any]]:
    """What hangs on the branches of `tree`, under dotted names; plain lists stay whole."""
    items: Any
    if isinstance(tree, dict) and (tree or name is None):
        items = tree.items()
    elif isinstance(tree, list) and _has_branches(tree):
        items = enumerate(tree)
    else:
        assert name is not None
        yield name, tree
        return
    for key, value in items:
        yield from _leaves(value, str(key) if name is None else f"{name}.{key}")


def _has_branches(items: list[Any]) -> bool:
    return any(
        isinstance(x, (Array, dict)) or (isinstance(x, list) and _has_branches(x)) for x in items
    )


class MsgpackWriter(SpanWriter):
    """The bytes of `flax.serialization.msgpack_serialize`, laid out before the first tensor.

    Names are split at their dots into nested dicts of string keys, sorted as that function
    sorts them. msgpack has no place for metadata: it is ignored, and what has to be kept goes
    into a file beside it, which is the caller's to write.
    """

    container: ClassVar[str] = "msgpack"

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, TensorInfo],
        metadata: Mapping[str, str],
        resumed: bool = False,
    ) -> None:
        super().__init__(path, tensors, metadata)
        layout = _Layout()
        layout.tree(_nest(self.tensors))
        self._spans = {n: [Span(*s) for s in spans] for n, spans in layout.spans.items()}
        try:
            self._create(layout.end, resumed)
            for offset, raw in layout.between:
                put(self._fd, raw, offset)
        except BaseException:
            self.close()
            raise


def _nest(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Nested dicts with (name, info) as leaves."""
    tree: dict[str, Any] = {}
    for name, info in tensors.items():
        *path, last = name.split(".")
        if len(path) >= MAX_DEPTH or CHUNKED in (*path, last):
            raise UsageError(f"{name} cannot be a path in a tree that flax reads", "rename it")
        node: Any = tree
        for key in path:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or last in node:
            raise UsageError(
                f"{name} cannot stand beside {_rival(name, tensors)} in a tree: "
                "one name would be both a tensor and a folder",
                "rename one of them or choose a container without trees, such as safetensors",
            )
        node[last] = (name, info)
    return tree


def _rival(name: str, tensors: Mapping[str, TensorInfo]) -> str:
    """The tensor that is a folder of `name`, or for which `name` is one."""
    return next(n for n in tensors if name.startswith(n + ".") or n.startswith(name + "."))


class _Layout:
    """Where everything goes: the tensors' bytes (`spans`) and what lies `between` them."""

    def __init__(self) -> None:
        self.end = 0
        self.spans: dict[str, list[tuple[int, int]]] = {}
        self.between = [(0, bytearray())]

    def tree(self, tree: dict[str, Any]) -> None:
        self._put(_length("map", len(tree)))
        for key in sorted(tree):
            self._put(_text(key))
            if isinstance(tree[key], dict):
                self.tree(tree[key])
            else:
                self._tensor(*tree[key])

    def _put(self, raw: bytes) -> None:
        self.between[-1][1].extend(raw)
        self.end += len(raw)

    def _tensor(self, name: str, info: TensorInfo) -> None:
        self.spans[name] = []
        if info.nbytes <= MAX_CHUNK_SIZE:
            self._array(name, info)
            return
        step = max(1, MAX_CHUNK_SIZE // dtypes.itemsize(info.dtype))
        starts = range(0, info.size, step)
        self._put(_length("map", 3) + _text(CHUNKED) + b"\xc3" + _text("shape"))
        self._put(_length("map", len(info.shape)))
        for axis, n in enumerate(info.shape):
            self._put(_text(str(axis)) + _integer(n))
        self._put(_text("chunks") + _length("map", len(starts)))
        for i, start in enumerate(starts):
            self._put(_text(str(i)))
            self._array(name, TensorInfo(info.dtype, (min(step, info.size - start),)))

    def _array(self, name: str, info: TensorInfo) -> None:
        shape = b"".join([_length("array", len(info.shape)), *map(_integer, info.shape)])
        inner = _length("array", 3) + shape + _text(dtypes.NAME[info.dtype])
        inner += _length("bin", info.nbytes)
        self._put(_length("ext", len(inner) + info.nbytes) + bytes([NDARRAY]) + inner)
        self.spans[name].append((self.end, info.nbytes))
        self.end += info.nbytes
        self.between.append((self.end, bytearray()))


# For each kind: the first byte and the largest length of the form that holds the length in that
# byte; then the first bytes of those with 8, 16 and 32 bits.
_LENGTHS = {
    "map": (0x80, 15, None, 0xDE, 0xDF),
    "array": (0x90, 15, None, 0xDC, 0xDD),
    "str": (0xA0, 31, 0xD9, 0xDA, 0xDB),
    "bin": (0, -1, 0xC4, 0xC5, 0xC6),
    "ext": (0, -1, 0xC7, 0xC8, 0xC9),
}


def _length(kind: str, n: int) -> bytes:
    """The start of an item of `n` bytes or entries, in the shortest form, as msgpack-python."""
    fixed, largest, *rest = _LENGTHS[kind]
    if kind == "ext" and n in (1, 2, 4, 8, 16):
        return bytes([0xD3 + n.bit_length()])
    if n <= largest:
        return bytes([fixed | n])
    for first, form, limit in zip(rest, ("B", "H", "I"), (2**8, 2**16, 2**32), strict=True):
        if first is not None and n < limit:
            return struct.pack(">B" + form, first, n)
    raise UsageError(f"{n} bytes or entries in one {kind} are too many for msgpack", "split it")


def _integer(n: int) -> bytes:
    """A whole number from 0 on."""
    if n < 2**7:
        return bytes([n])
    bits = next(b for b in range(4) if n < 2 ** (8 << b))
    return struct.pack(">B" + "BHIQ"[bits], 0xCC + bits, n)


def _text(text: str) -> bytes:
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"the key {text!r} in a tensor's name is not valid Unicode", "rename the tensor"
        ) from None
    return _length("str", len(raw)) + raw
