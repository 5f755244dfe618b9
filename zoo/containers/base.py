"""What every container is: named arrays behind a header.

A Reader knows all names, shapes and dtypes before it reads a tensor. A Writer is told all of
them before it is given one, so it can lay out its file first and take tensors in any order. Both
work in regions of tensors (`zoo.containers.regions`), and in several threads at once.
Containers that hold trees join the keys of a path with dots: `{"fc1": {"kernel": x}}` is the
tensor `fc1.kernel`.
"""

from __future__ import annotations

import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np

from zoo.containers import dtypes
from zoo.containers.errors import CorruptInput
from zoo.containers.regions import Region, blocks, extent, size, tiles, whole

_PIECE = 4 << 20
_PREAD_MAX = 1 << 30  # Linux moves at most 2 GiB - 4 KiB a call


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Dtype code (see `zoo.containers.dtypes`) and shape of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements, row-major and without padding."""
        return self.size * dtypes.itemsize(self.dtype)


class Reader(ABC):
    """A checkpoint opened for reading. No tensor is read before `read` asks for it."""

    container: ClassVar[str]  # "safetensors", "torch", "msgpack", "orbax", "onnx"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}  # the header, in the file's order
        self.ties: dict[str, str] = {}  # a tensor that is the same storage as an earlier one
        self.metadata: dict[str, str] = {}  # the container's own string metadata
        self.extras: dict[str, Any] = {}  # plain data beside the tensors: numbers, strings
        self.beside: list[str] = []  # other files of the same checkpoint, not read
        self.notices: list[str] = []  # what a user should be told about the file
        self.first_state: object = None  # its `state` before anything was read

    @abstractmethod
    def read(
        self, name: str, region: Region | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """The tensor `name`, or a region of it: C-contiguous, the caller's own, bit for bit as
        stored; in `out`, where that is given (C-contiguous, of the region's shape and the dtype).

        Raises CorruptInput where the file does not hold what its header says.
        """

    def state(self) -> object:
        """Something that is another once the files have been written to; to be compared."""
        return None

    def close(self) -> None:  # noqa: B027 - a reader without open files need not override it
        """Release the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


class Writer(ABC):
    """A checkpoint being written to `path`, which must not exist yet.

    Call `write` once for each tensor of the header, or for each of the regions that fill it, in
    any order, then `finish`, which makes the file durable. Left through an exception, a writer
    closes what it holds; what lies at `path` is then incomplete and is the caller's to remove.
    """

    container: ClassVar[str]

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
    ) -> None:
        self.path = path
        self.tensors = dict(tensors)
        self.metadata = dict(metadata)
        # Elements that each tensor still lacks, one for a tensor without any.
        self._lacking = {name: max(1, info.size) for name, info in self.tensors.items()}
        self._lock = threading.Lock()

    def write(self, name: str, array: np.ndarray, region: Region | None = None) -> None:
        """Write the tensor `name`, or a region of it; any memory order is taken, the values are
        what counts."""
        info = self.tensors[name]
        region = whole(info.shape) if region is None else region
        if (array.dtype, array.shape) != (dtypes.NUMPY[info.dtype], extent(region)):
            raise ValueError(
                f"{name}: header says {info.dtype} {info.shape}, got {array.dtype} {array.shape}"
            )
        self._take(name, size(region))
        self._write(name, array, region)
        self._wrote(name, size(region))

    def copy(self, name: str, reader: Reader, source: str, region: Region | None = None) -> bool:
        """Have the kernel copy a tensor, or a region of it, as it is, and say whether it could; if
        not, it is still to be written."""
        info = self.tensors[name]
        region = whole(info.shape) if region is None else region
        if info != reader.tensors[source] or not self._copy(name, reader, source, region):
            return False
        self._take(name, size(region))
        self._wrote(name, size(region))
        return True

    def skip(self, name: str, region: Region) -> None:
        """Note that a region lies there already: an earlier writer, which did not finish, wrote it
        (see `resumed` of the writers that can go on)."""
        self._take(name, size(region))
        self._skip(name, region)
        self._wrote(name, size(region))

    def _skip(self, name: str, region: Region) -> None:  # noqa: B027
        """The same for what the writer is made of."""

    def _take(self, name: str, elements: int) -> None:
        """Note what is being written; ValueError for what was written before."""
        with self._lock:
            if self._lacking[name] < max(1, elements):
                raise ValueError(f"{name} was written twice")
            self._lacking[name] -= max(1, elements)

    def _wrote(self, name: str, elements: int) -> None:  # noqa: B027
        """Some of a tensor, perhaps the last of it, has been written."""

    def place(self, name: str) -> tuple[str, int]:
        """Where the tensor begins: to write in this order is to write files from front to back."""
        return "", 0

    def finish(self) -> None:
        """Complete the checkpoint and flush it to the disk."""
        self.complete()
        self.sync()

    def complete(self) -> None:
        """The first half: it can be read, and is not yet durable."""
        if unwritten := sorted(name for name, n in self._lacking.items() if n):
            raise ValueError(f"never written: {unwritten}")
        self._complete()

    @abstractmethod
    def sync(self) -> None:
        """The second half of `finish`: flush it to the disk. It may be read meanwhile."""

    @abstractmethod
    def _write(self, name: str, array: np.ndarray, region: Region) -> None: ...

    def _copy(self, name: str, reader: Reader, source: str, region: Region) -> bool:
        return False

    def _complete(self) -> None:  # noqa: B027
        """Write what is known only once all tensors are."""

    def close(self) -> None:  # noqa: B027
        """Release what is held, finished or not."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


def pread(fd: int, nbytes: int, offset: int, what: str) -> np.ndarray:
    """`nbytes` bytes at `offset` of the file `fd`, as an array of uint8.

    Reading by pread and not by mmap: a file truncated underneath is then an error that can be
    reported, not a SIGBUS. Raises CorruptInput, naming `what`, where the file is too short.
    """
    buffer = np.empty(nbytes, np.uint8)
    fill(fd, buffer.data, offset, what)
    return buffer


def fill(fd: int, view: memoryview, offset: int, what: str) -> None:
    """The same into `view`, a buffer of bytes."""
    done, nbytes = 0, len(view)
    while done < nbytes:
        part = view[done : done + _PREAD_MAX] if done or nbytes > _PREAD_MAX else view
        try:
            got = os.preadv(fd, [part], offset + done)
        except OSError as e:
            raise OSError(e.errno, e.strerror, what) from None
        if got == 0:
            raise CorruptInput(
                f"{what}: the file ends {nbytes - done} bytes too early",
                "it is truncated: copy or download it again",
            )
        done += got


def put(fd: int, view: memoryview | bytes | bytearray, offset: int) -> None:
    """Write bytes at `offset` of the file `fd`."""
    view = memoryview(view)
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done : done + _PREAD_MAX], offset + done)


def as_array(raw: np.ndarray, info: TensorInfo) -> np.ndarray:
    """`raw` bytes seen as the tensor that `info` describes."""
    return raw.view(dtypes.NUMPY[info.dtype]).reshape(info.shape)


def fsync(path: Path) -> None:
    """Make what was written to a file durable, or the names in a directory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def same_bits(reader: Reader, a: str, b: str) -> bool:
    """Whether two tensors of a file have the same bytes; both are read piece by piece."""
    info = reader.tensors[a]
    if info != reader.tensors[b]:
        return False
    pieces = tiles(info.shape, blocks(info.shape, _PIECE // dtypes.itemsize(info.dtype)))
    return all(reader.read(a, r).tobytes() == reader.read(b, r).tobytes() for r in pieces)
