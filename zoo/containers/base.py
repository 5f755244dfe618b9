"""What every container is: named arrays behind a header.

A Reader knows all names, shapes and dtypes before it reads a tensor. A Writer is told all of
them before it is given one, so it can lay out its file first and take tensors in any order.
Containers that hold trees join the keys of a path with dots: `{"fc1": {"kernel": x}}` is the
tensor `fc1.kernel`.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np

from zoo.containers import dtypes
from zoo.containers.errors import CorruptInput

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

    @abstractmethod
    def read(self, name: str) -> np.ndarray:
        """The tensor `name`: C-contiguous, the caller's own, bit for bit as stored.

        Raises CorruptInput where the file does not hold what its header says.
        """

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

    Call `write` once for each tensor of the header, in any order, then `finish`, which makes
    the file durable. Left through an exception, a writer closes what it holds; what lies at
    `path` is then incomplete and is the caller's to remove.
    """

    container: ClassVar[str]

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
    ) -> None:
        self.path = path
        self.tensors = dict(tensors)
        self.metadata = dict(metadata)
        self._unwritten = set(self.tensors)

    def write(self, name: str, array: np.ndarray) -> None:
        """Write the tensor `name`; any memory order is taken, the values are what counts."""
        info = self.tensors[name]
        if (array.dtype, array.shape) != (dtypes.NUMPY[info.dtype], info.shape):
            raise ValueError(
                f"{name}: header says {info.dtype} {info.shape}, got {array.dtype} {array.shape}"
            )
        self._unwritten.remove(name)
        self._write(name, np.asarray(array, order="C"))

    def finish(self) -> None:
        """Complete the checkpoint and flush it to the disk."""
        if self._unwritten:
            raise ValueError(f"never written: {sorted(self._unwritten)}")
        self._finish()

    @abstractmethod
    def _write(self, name: str, array: np.ndarray) -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...

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
    view = memoryview(buffer.data)
    done = 0
    while done < nbytes:
        got = os.preadv(fd, [view[done : done + _PREAD_MAX]], offset + done)
        if got == 0:
            raise CorruptInput(
                f"{what}: the file ends {nbytes - done} bytes too early",
                "it is truncated: copy or download it again",
            )
        done += got
    return buffer


def pwrite(fd: int, array: np.ndarray, offset: int) -> None:
    """Write the C-contiguous `array`'s bytes at `offset` of the file `fd`."""
    view = memoryview(array.reshape(-1).view(np.uint8).data) if array.size else memoryview(b"")
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done : done + _PREAD_MAX], offset + done)


def as_array(raw: np.ndarray, info: TensorInfo) -> np.ndarray:
    """`raw` bytes seen as the tensor that `info` describes."""
    return raw.view(dtypes.NUMPY[info.dtype]).reshape(info.shape)


def fsync_directory(path: Path) -> None:
    """Make the names in directory `path` durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
