"""What a checkpoint's pickle is made of, and how each is built from its arguments as data.

Each builder stands for one function of Python's, torch's or NumPy's, and is given what the file
would have called that with. It returns NotImplemented for arguments that it does not know, which
makes a placeholder of the call; it raises PickleError for those that cannot be right.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from zoo.containers.torch_file.names import SCRIPT_BUILDERS, STORAGES, Global, shown

_MAX_DIMS = 32
_SIMPLE_DTYPE = re.compile(r"\?|b1|[iu][1248]|f[248]|c8|c16")


class PickleError(ValueError):
    """The pickle is not one that any pickler would write."""


class Placeholder:
    """What some unknown callable would have built; `kind` is its qualified name."""

    __slots__ = ("args", "kind", "state")

    def __init__(self, kind: str, args: Any = ()) -> None:
        self.kind = kind
        self.args = args
        self.state: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class StorageRef:
    """`nbytes` bytes, from byte `start` of the storage that the file calls `key`."""

    key: str
    dtype: str  # torch's name for it
    nbytes: int
    total: int  # bytes of the whole storage, of which this may be a part
    start: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class TensorRef:
    """A strided view of a storage, in elements; nothing here is checked against the storage."""

    storage: StorageRef
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    flags: tuple[str, ...] = ()  # "conj", "neg": the values are not the storage's own


class NumpyDtype:
    """A NumPy dtype in the making: its state sets the byte order."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype

    def set_state(self, state: Any) -> None:
        match state:
            case (_, "<" | ">" | "|" | "=" as order, None, None, None, *_):
                self.dtype = self.dtype.newbyteorder(order)
            case _:
                raise PickleError("a NumPy dtype has no state that NumPy writes")


class NumpyArray:
    """A NumPy array in the making. None where its dtype is not a plain number."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array: np.ndarray | None = None

    def set_state(self, limits: Limits, state: Any) -> None:
        match state:
            case (_, shape, dtype, fortran, raw):
                self.fill(limits, raw, dtype, shape, "F" if fortran else "C")
            case _:
                raise PickleError("an array has no state that NumPy writes")

    def fill(self, limits: Limits, raw: Any, dtype: Any, shape: Any, order: Any) -> None:
        """Take the bytes `raw`, which must be as many as `shape` needs."""
        if not isinstance(dtype, NumpyDtype):
            return  # objects, strings or records: stays empty, and is dropped with a notice
        if isinstance(raw, str):  # from Python 2
            raw = raw.encode("latin-1")
        if not isinstance(raw, (bytes, bytearray)) or order not in ("C", "F"):
            raise PickleError("an array does not consist of bytes")
        limits.charge(len(raw))
        dims = tuple(natural(n) for n in integers(shape))
        array = np.frombuffer(raw, dtype.dtype) if raw else np.empty(0, dtype.dtype)
        array = array.reshape(dims, order=order)
        self.array = np.array(array, dtype.dtype.newbyteorder("="), order="C")


class Limits(Protocol):
    """What the machine allows a builder."""

    def charge(self, amount: int) -> None:
        """Account for `amount` items or bytes copied, which the memo could repeat at will."""

    def key(self, value: Any) -> Any:
        """`value` as a key, if hashing and comparing it is cheap."""


def natural(value: Any) -> int:
    """`value`, if it is a count that fits 63 bits."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise PickleError("a size is not a natural number")
    return value


def integers(value: Any) -> tuple[int, ...]:
    """`value`, if it is a tuple of integers as a shape or strides are; they may be negative."""
    if not isinstance(value, (tuple, list)) or len(value) > _MAX_DIMS:
        raise PickleError(f"a shape is not a tuple of at most {_MAX_DIMS} integers")
    if not all(type(n) is int and n.bit_length() < 64 for n in value):
        raise PickleError("a shape does not consist of integers")
    return tuple(value)


def storage(kind: Global, key: Any, numel: int, view: Any = None) -> StorageRef:
    """The storage that a persistent id describes."""
    if kind.storage is None or type(key) not in (str, int):
        raise PickleError(f"a storage is of the type {kind.shown}")
    dtype, itemsize = STORAGES[kind.storage]
    total = natural(numel) * itemsize
    if view is None:
        return StorageRef(str(key), dtype, total, total)
    match view:  # torch before 0.4 had storages that are views of others
        case (_, offset, size):
            start, nbytes = natural(offset) * itemsize, natural(size) * itemsize
            if start + nbytes <= total:
                return StorageRef(str(key), dtype, nbytes, total, start)
    raise PickleError(f"storage {shown(str(key))} is not inside the one it is a view of")


Builder = Callable[[Limits, tuple[Any, ...]], Any]


def _tensor(limits: Limits, args: tuple[Any, ...]) -> Any:
    """torch._utils._rebuild_tensor and _v2."""
    match args:
        case (StorageRef() as block, offset, size, stride, *rest) if len(rest) in (0, 2, 3):
            return _view(block, block.dtype, offset, size, stride, rest[2:])
        case (StorageRef(), *_):
            raise PickleError(f"a tensor is made of {len(args)} things")
    return NotImplemented


def _tensor_v3(limits: Limits, args: tuple[Any, ...]) -> Any:
    """The same of a storage without a dtype."""
    match args:
        case (StorageRef() as block, offset, size, stride, _, _, Global() as dtype, *rest) if (
            len(rest) < 2
        ):
            return _view(block, dtype.dtype or dtype.shown, offset, size, stride, rest)
    return NotImplemented


def _view(
    block: StorageRef, dtype: str, offset: Any, size: Any, stride: Any, rest: list[Any]
) -> TensorRef:
    shape, steps = integers(size), integers(stride)
    (start,) = integers((offset,))
    if len(shape) != len(steps):
        raise PickleError("a tensor has not as many strides as dimensions")
    metadata = rest[0] if rest and isinstance(rest[0], dict) else {}
    flags = tuple(bit for bit in ("conj", "neg") if metadata.get(bit))
    return TensorRef(block, dtype, start, shape, steps, flags)


def _parameter(limits: Limits, args: tuple[Any, ...]) -> Any:
    """torch._utils._rebuild_parameter and _with_state: the tensor, or what stands for it."""
    known = args and isinstance(args[0], (TensorRef, Placeholder))
    return args[0] if known else NotImplemented


def _items(limits: Limits, args: tuple[Any, ...]) -> Any:
    """The elements that a container is made from."""
    match args:
        case ():
            return ()
        case (tuple() | list() | set() | frozenset() as items,):
            limits.charge(len(items))
            return items
    return NotImplemented


def _container(make: Callable[[Any], Any], keyed: bool = False) -> Builder:
    def build(limits: Limits, args: tuple[Any, ...]) -> Any:
        items = _items(limits, args)
        if items is NotImplemented:
            return items
        return make(limits.key(item) for item in items) if keyed else make(items)

    return build


def _dict(limits: Limits, args: tuple[Any, ...]) -> Any:
    """dict, OrderedDict, Counter: from nothing, from another or from pairs."""
    if args and isinstance(args[0], dict):
        limits.charge(len(args[0]))
        return dict(args[0])
    pairs = _items(limits, args)
    if pairs is NotImplemented:
        return pairs
    result = {}
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise PickleError("a dictionary is made of something other than pairs")
        result[limits.key(pair[0])] = pair[1]
    return result


def _number(kind: Callable[..., Any]) -> Builder:
    """int, float, bool, complex, of numbers only."""

    def build(limits: Limits, args: tuple[Any, ...]) -> Any:
        plain = len(args) <= 2 and all(type(a) in (int, float, bool) for a in args)
        return kind(*args) if plain else NotImplemented

    return build


def _text(limits: Limits, args: tuple[Any, ...]) -> Any:
    match args:
        case ():
            return ""
        case (str() as text,):
            return text
    return NotImplemented


def _bytes(kind: type[bytes | bytearray]) -> Builder:
    def build(limits: Limits, args: tuple[Any, ...]) -> Any:
        match args:
            case ():
                return kind()
            case (bytes() | bytearray() as raw,):
                limits.charge(len(raw))
                return kind(raw)
            case (str() as text, "latin-1" | "latin1" | "utf-8" | "ascii" as encoding):
                limits.charge(len(text))
                return kind(text.encode(encoding))
        return NotImplemented

    return build


def _device(limits: Limits, args: tuple[Any, ...]) -> Any:
    match args:
        case (str() as kind,):
            return kind
        case (str() as kind, int() as index) if index.bit_length() < 32:
            return f"{kind[:64]}:{index}"
    return NotImplemented


def _numpy_dtype(limits: Limits, args: tuple[Any, ...]) -> Any:
    match args:
        case (str() as code, *_) if _SIMPLE_DTYPE.fullmatch(code):
            return NumpyDtype(np.dtype(code))
    return NotImplemented


def _numpy_scalar(limits: Limits, args: tuple[Any, ...]) -> Any:
    """A Python number."""
    match args:
        case (NumpyDtype() as dtype, str() | bytes() | bytearray() as raw):
            array = NumpyArray()
            array.fill(limits, raw, dtype, (), "C")
            return array.array.item() if array.array is not None else NotImplemented
    return NotImplemented


def _numpy_empty(limits: Limits, args: tuple[Any, ...]) -> Any:
    """numpy.core.multiarray._reconstruct: an array that its state will fill."""
    match args:
        case (Global() as kind, *_) if kind.qualified == "numpy.ndarray":
            return NumpyArray()
    return NotImplemented


def _numpy_array(limits: Limits, args: tuple[Any, ...]) -> Any:
    """numpy.core.numeric._frombuffer, which protocol 5 uses."""
    match args:
        case (raw, dtype, shape, order):
            array = NumpyArray()
            array.fill(limits, raw, dtype, shape, order)
            return array
    return NotImplemented


def _typed(limits: Limits, args: tuple[Any, ...]) -> Any:
    """TorchScript's lists, and what it says the type of: the first argument as it is."""
    return args[0] if args else NotImplemented


BUILDERS: dict[str, Builder] = {
    **{f"torch.jit._pickle.{name}": _typed for name in SCRIPT_BUILDERS},
    "builtins.list": _container(list),
    "builtins.tuple": _container(tuple),
    "builtins.set": _container(set, keyed=True),
    "builtins.frozenset": _container(frozenset, keyed=True),
    "builtins.dict": _dict,
    "builtins.int": _number(int),
    "builtins.float": _number(float),
    "builtins.bool": _number(bool),
    "builtins.complex": _number(complex),
    "builtins.str": _text,
    "builtins.bytes": _bytes(bytes),
    "builtins.bytearray": _bytes(bytearray),
    "_codecs.encode": _bytes(bytes),
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": lambda limits, args: (
        {} if len(args) < 2 else _dict(limits, args[1:])
    ),
    "torch.Size": _container(tuple),
    "torch.device": _device,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "numpy.dtype": _numpy_dtype,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray._reconstruct": _numpy_empty,
    "numpy._core.numeric._frombuffer": _numpy_array,
}
