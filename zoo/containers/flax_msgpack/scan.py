"""Finding the arrays in a file that flax has written, without reading their bytes."""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from zoo.containers import dtypes
from zoo.containers.base import TensorInfo, pread
from zoo.containers.errors import CorruptInput

CHUNKED = "__msgpack_chunked_array__"
NDARRAY, COMPLEX, SCALAR = 1, 2, 3  # extension types
MAX_DEPTH = 100
_MAX_HEADER = 100_000_000  # of what is not tensor bytes, as safetensors has it
_WINDOW = 4096
_AGAIN = "it is damaged or was not written by flax: copy or download it again"

# First bytes that are followed by a number, or by a length, in the given form.
_NUMBERS = {
    0xCA: (">f", "float"),
    0xCB: (">d", "float"),
    **{0xCC + i: (">" + c, "int") for i, c in enumerate("BHIQbhiq")},
    **{0xC4 + i: (">" + c, "bin") for i, c in enumerate("BHI")},
    **{0xC7 + i: (">" + c, "ext") for i, c in enumerate("BHI")},
    **{0xD9 + i: (">" + c, "str") for i, c in enumerate("BHI")},
    **{0xDC + i: (">" + c, "array") for i, c in enumerate("HI")},
    **{0xDE + i: (">" + c, "map") for i, c in enumerate("HI")},
}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


@dataclass(frozen=True, slots=True)
class Array:
    """An array in the file: what it is, and the pieces of the file that hold its bytes."""

    info: TensorInfo
    spans: tuple[tuple[int, int], ...]  # (offset, bytes)


class Scanner:
    """Walks the file once, through a small window, stepping over the bytes of arrays."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path
        self._size = os.fstat(fd).st_size
        self._at = 0
        self._window = b""
        self._window_at = 0
        self._read = 0  # bytes taken that belong to no tensor
        self._keys: list[str] = []  # where in the tree we are, for messages

    def root(self) -> dict[str, Any]:
        """The whole file as a tree of dicts, lists, plain values and `Array`s."""
        tree = self._value()
        if not isinstance(tree, dict):
            self._fail("holds one value and not a map of names to arrays")
        if self._at != self._size:
            self._fail(f"{self._size - self._at} bytes follow its end")
        return tree

    def _fail(self, problem: str) -> NoReturn:
        where = ".".join(self._keys)
        raise CorruptInput(f"{self._path}: {where}{': ' if where else ''}{problem}", _AGAIN)

    def _need(self, n: int) -> None:
        if n > self._size - self._at:
            self._fail(f"{n} bytes are due at byte {self._at} and the file has {self._size}")

    def _take(self, n: int) -> bytes:
        self._need(n)
        self._read += n
        if self._read > _MAX_HEADER:
            self._fail(f"more than {_MAX_HEADER} bytes of the file belong to no tensor")
        start = self._at - self._window_at
        if start + n > len(self._window):
            length = min(max(n, _WINDOW), self._size - self._at)
            self._window = pread(self._fd, length, self._at, str(self._path)).tobytes()
            self._window_at, start = self._at, 0
        self._at += n
        return self._window[start : start + n]

    def _head(self) -> tuple[str, Any]:
        """The next item's kind, and its value or its length."""
        first = self._take(1)[0]
        if first <= 0x7F:
            return "int", first
        if first <= 0x8F:
            return "map", first & 0x0F
        if first <= 0x9F:
            return "array", first & 0x0F
        if first <= 0xBF:
            return "str", first & 0x1F
        if first >= 0xE0:
            return "int", first - 0x100
        if first in _CONSTANTS:
            return "constant", _CONSTANTS[first]
        if 0xD4 <= first <= 0xD8:
            return "ext", 1 << (first - 0xD4)
        if first not in _NUMBERS:
            self._fail(f"byte {self._at - 1} is 0xc1, which msgpack does not use")
        form, kind = _NUMBERS[first]
        return kind, struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _value(self) -> Any:
        if len(self._keys) > MAX_DEPTH:
            # Not _fail: so long a name would hide the message.
            raise CorruptInput(f"{self._path}: nested more than {MAX_DEPTH} deep", _AGAIN)
        kind, value = self._head()
        if kind == "map":
            return self._map(value)
        if kind == "array":
            self._need(value)
            return [self._child(str(i)) for i in range(value)]
        if kind == "ext":
            return self._extension(value)
        if kind == "str":
            return self._text(value)
        if kind == "bin":
            return self._take(value)
        return value

    def _child(self, key: str) -> Any:
        self._keys.append(key)
        value = self._value()
        self._keys.pop()
        return value

    def _text(self, length: int) -> str:
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as e:
            self._fail(f"a string is not UTF-8: {e}")

    def _map(self, length: int) -> Any:
        self._need(2 * length)
        result: dict[str, Any] = {}
        for _ in range(length):
            kind, key = self._head()
            if kind not in ("str", "int"):
                self._fail(f"a key is neither string nor integer but {kind}")
            name = self._text(key) if kind == "str" else str(key)
            if name in result:
                self._fail(f"the key {name!r} stands twice")
            result[name] = self._child(name)
        return self._unchunk(result) if CHUNKED in result else result

    def _extension(self, length: int) -> Any:
        (code,) = struct.unpack("b", self._take(1))
        self._need(length)
        end = self._at + length
        if code in (NDARRAY, SCALAR):
            value: Any = self._array()
        elif code == COMPLEX:
            value = self._complex()
        else:
            self._fail(f"extension type {code} is not one of flax's")
        if self._at != end:
            self._fail(f"an extension ends at byte {self._at}, its length says {end}")
        return value

    def _expect(self, kind: str, what: str) -> Any:
        found, value = self._head()
        if found != kind:
            self._fail(f"{what} is of msgpack type {found}, not {kind}")
        return value

    def _array(self) -> Array:
        if self._expect("array", "the array") != 3:
            self._fail("an array is not a triple of shape, dtype and bytes")
        rank = self._expect("array", "the shape")
        if rank > 64:
            self._fail(f"an array has {rank} axes")
        shape = tuple(self._expect("int", "the shape's entry") for _ in range(rank))
        kind, length = self._head()
        if kind not in ("str", "bin"):
            self._fail(f"the dtype is of msgpack type {kind}, not str")
        info = self._info(self._text(length), shape)
        kind, nbytes = self._head()
        if kind not in ("str", "bin"):  # flax before msgpack 1.0 had strings only
            self._fail(f"the bytes are of msgpack type {kind}, not bin")
        if nbytes != info.nbytes:
            self._fail(f"{info.dtype} {shape} needs {info.nbytes} bytes, {nbytes} are there")
        self._need(nbytes)
        span = (self._at, nbytes)
        self._at += nbytes
        return Array(info, (span,))

    def _info(self, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
        if dtype not in dtypes.FROM_NAME:
            raise CorruptInput(
                f"{self._path}: {'.'.join(self._keys)} has dtype {dtype!r}, "
                "which this version does not carry",
                f"known are {' '.join(dtypes.FROM_NAME)}",
            )
        info = TensorInfo(dtypes.FROM_NAME[dtype], shape)
        size = math.prod(max(n, 1) for n in shape) * dtypes.itemsize(info.dtype)
        if size >= 2**63 or min(shape, default=0) < 0:
            self._fail(f"an array has the shape {shape}")
        return info

    def _complex(self) -> complex:
        if self._expect("array", "the complex number") != 2:
            self._fail("a complex number is not a pair")
        return complex(
            self._expect("float", "the real part"), self._expect("float", "the imaginary part")
        )

    def _unchunk(self, tree: dict[str, Any]) -> Array:
        """The one array that the map `tree` of chunks stands for."""
        if tree.keys() != {CHUNKED, "shape", "chunks"}:
            self._fail(f"a chunked array has the keys {sorted(tree)}")
        shape, chunks = self._tuple(tree["shape"], "shape"), self._tuple(tree["chunks"], "chunks")
        if len(shape) > 64 or not all(type(n) is int for n in shape):
            self._fail(f"a chunked array has the shape {shape[:65]}")
        if not chunks or not all(isinstance(c, Array) and len(c.info.shape) == 1 for c in chunks):
            self._fail("a chunk is missing or not a one-dimensional array")
        kinds = {c.info.dtype for c in chunks}
        if len(kinds) > 1:
            self._fail(f"its chunks are of several dtypes, {sorted(kinds)}")
        info = self._info(dtypes.NAME[kinds.pop()], shape)
        if info.size != sum(c.info.size for c in chunks):
            self._fail(f"its chunks do not fill the shape {shape}")
        return Array(info, tuple(span for c in chunks for span in c.spans))

    def _tuple(self, tree: Any, what: str) -> tuple[Any, ...]:
        """flax's tuples: dicts from "0", "1", ... on."""
        keys = [str(i) for i in range(len(tree))] if isinstance(tree, dict) else []
        if not isinstance(tree, dict) or tree.keys() != set(keys):
            self._fail(f"the {what} of a chunked array is not numbered from 0 on")
        return tuple(tree[key] for key in keys)
