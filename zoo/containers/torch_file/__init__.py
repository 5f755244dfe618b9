"""What torch.save writes: read without torch and without running it, written with torch.

Own reader because torch.load, even with weights_only=True, checks no checksum, expands a
deflated file and a stride-0 tensor to whatever size they claim, and refuses harmless values.
Here the pickle is interpreted as data (`machine`), every tensor is held against its
storage before any is read, and storages are read by pread, their CRC-32 checked.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, ClassVar, cast

import numpy as np

from zoo.containers import dtypes
from zoo.containers.base import TensorInfo, fsync
from zoo.containers.committed import open_file
from zoo.containers.errors import CorruptInput, MissingExtra, UnsafeInput, UsageError
from zoo.containers.regions import Region, extent, whole
from zoo.containers.spans import Span, SpanReader, Spans, SpanWriter
from zoo.containers.strided import copy
from zoo.containers.torch_file.archive import POLICY, Record, open_zip, read_span
from zoo.containers.torch_file.builders import TensorRef
from zoo.containers.torch_file.legacy import open_legacy
from zoo.containers.torch_file.names import shown
from zoo.containers.torch_file.tree import Tree

_MAX_EXPANDED = 64 << 20  # bytes of a tensor that has more elements than its storage
_ALIGNMENT = 64  # of a tensor in the spool
_NEAR = 1 << 16  # bytes that are read for few of them
_AGAIN = "it is damaged or was written wrongly: copy or download it again"


class TorchReader(SpanReader):
    """One `.pt`, `.pth` or `.bin` file, in the zip format or in that of before torch 1.6.

    Dicts and lists are flattened with dots; keys that are not strings are written as str() does.
    Of a stable-baselines3 `.zip` the file `member` is read, and a notice says so; the others are
    `beside`. A pickled module gives what its state_dict() would. Values that only running the
    file's code could build are dropped, with a notice for each kind. A file that would run what no
    checkpoint needs raises UnsafeInput.
    """

    container: ClassVar[str] = "torch"

    def __init__(self, path: Path, member: str = POLICY) -> None:
        super().__init__(path)
        self._what = shown(str(path))
        self._checked: set[str] = set()  # storages whose checksum was found right
        self._checking = threading.Lock()
        self._fd = open_file(path)
        try:
            root, self._records, self.beside = _open(self._fd, self._what, member)
            self._collect(root)
            if self.beside:
                self.notices.insert(0, f"of stable-baselines3: {shown(member)} is read")
        except BaseException:
            self.close()
            raise

    def _collect(self, root: Any) -> None:
        tree = Tree(root, self._what)
        self._views = tree.tensors
        self.extras = tree.extras
        self.notices = tree.notices
        first: dict[tuple[Any, ...], str] = {}
        for name, view in self._views.items():
            what = f"{self._what}: {shown(name)}"
            self.tensors[name] = _info(view, self._records.get(view.storage.key), what)
            block = view.storage
            same = (block.key, block.start, view.dtype, view.offset, view.shape, view.stride)
            if first.setdefault(same, name) != name:
                self.ties[name] = first[same]

    def spans(self, name: str) -> Spans | None:
        """Where the tensor lies; None for a strided view."""
        info, view = self.tensors[name], self._views[name]
        if not info.size:
            return ()
        if not _is_contiguous(view):
            return None
        return (Span(self._start(view), info.nbytes),)

    def vouch(self, name: str) -> None:
        key = self._views[name].storage.key
        with self._checking:  # a second worker waits, and does not check it too
            if key not in self._checked and (record := self._records.get(key)) is not None:
                read_span(self._fd, record, 0, 0, f"{self._what}: {shown(name)}")
                self._checked.add(key)

    def read(
        self, name: str, region: Region | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        info, view = self.tensors[name], self._views[name]
        region = whole(info.shape) if region is None else region
        dtype, what = dtypes.NUMPY[info.dtype], f"{self._what}: {shown(name)}"
        out = np.empty(extent(region), dtype) if out is None else out
        if not out.size:
            return out
        block, record = view.storage, self._records[view.storage.key]
        if out.size == info.size and _is_contiguous(view):  # all at once: read and checked in one
            start = block.start + view.offset * dtype.itemsize
            raw = out.reshape(-1).view(np.uint8).data
            check = block.key not in self._checked
            read_span(self._fd, record, start, start + info.nbytes, what, check=check, into=raw)
            self._checked.add(block.key)
            return out
        self.vouch(name)
        strides = [step * dtype.itemsize for step in view.stride]
        start = block.start + view.offset * dtype.itemsize
        start += sum(s.start * step for s, step in zip(region, strides, strict=True))
        self._gather(record, start, strides, out, what)
        return out

    def _gather(
        self, record: Record, start: int, strides: list[int], out: np.ndarray, what: str
    ) -> None:
        """Read a strided view into `out`: at once what lies close, else piece by piece."""
        reach = sum((n - 1) * step for n, step in zip(out.shape, strides, strict=True))
        span = reach + out.itemsize
        if span <= max(2 * out.nbytes, _NEAR) or out.ndim == 0:
            raw = read_span(self._fd, record, start, start + span, what, check=False)
            copy(np.ndarray(out.shape, out.dtype, raw.data, strides=strides), out)
            return
        axis = max(range(out.ndim), key=lambda a: strides[a] * (out.shape[a] > 1))
        for i in range(out.shape[axis]):
            part = out[(slice(None),) * axis + (slice(i, i + 1),)]
            self._gather(record, start + i * strides[axis], strides, part, what)

    def _start(self, view: TensorRef) -> int:
        """Where in the file the view's first element lies."""
        block = view.storage
        record = self._records[block.key]
        itemsize = dtypes.itemsize(dtypes.FROM_NAME[view.dtype])
        return record.offset + block.start + view.offset * itemsize


def _open(fd: int, what: str, member: str) -> tuple[Any, dict[str, Record], list[str]]:
    """The unpickled object, the records of its storages, and the files beside it."""
    start = os.pread(fd, 512, 0)
    if start[257:262] == b"ustar":
        raise UsageError(
            f"{what}: a tar file; torch wrote checkpoints so before version 0.1.10",
            "load it with torch.load and save it again with torch.save",
        )
    return (
        open_zip(fd, what, member=member)
        if start.startswith(b"PK")
        else (*open_legacy(fd, what), [])
    )


def _last(view: TensorRef) -> int:
    """The last element of a view that has one, counted from its first."""
    return sum((n - 1) * step for n, step in zip(view.shape, view.stride, strict=True))


def _is_contiguous(view: TensorRef) -> bool:
    expected = 1
    for n, step in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if n != 1 and step != expected:
            return False
        expected *= n
    return True


def _info(view: TensorRef, record: Record | None, what: str) -> TensorInfo:
    """The header's line for `view`, which must lie within its storage and the storage exist."""
    if view.flags:
        raise UsageError(
            f"{what} is a lazy view ({', '.join(view.flags)}) of other values",
            "save tensor.resolve_conj().resolve_neg() instead",
        )
    code = dtypes.FROM_NAME.get(view.dtype)
    if code is None:
        raise CorruptInput(
            f"{what} has dtype {shown(view.dtype)}, which this version does not carry",
            f"known are {' '.join(dtypes.FROM_NAME)}",
        )
    if view.offset < 0 or min((*view.shape, *view.stride), default=0) < 0:
        raise CorruptInput(
            f"{what} has the shape {view.shape}, strides {view.stride}, offset {view.offset}",
            _AGAIN,
        )
    info = TensorInfo(code, view.shape)
    itemsize = dtypes.itemsize(code)
    if itemsize * math.prod(max(n, 1) for n in view.shape) >= 1 << 63:
        raise UnsafeInput(f"{what} claims the shape {view.shape}", _AGAIN)
    block = view.storage
    held = record.size if record else 0
    if not 0 <= held - block.total < itemsize:
        raise CorruptInput(
            f"{what}: its storage should have {block.total} bytes, the file has {held} of it",
            _AGAIN,
        )
    if info.size and (view.offset + _last(view) + 1) * itemsize > block.nbytes:
        raise CorruptInput(
            f"{what} reaches to element {view.offset + _last(view)} of a storage of "
            f"{block.nbytes // itemsize}",
            _AGAIN,
        )
    if info.nbytes > max(block.nbytes, _MAX_EXPANDED):
        raise UnsafeInput(
            f"{what} would expand {block.nbytes} bytes in the file to {info.nbytes}",
            "if you trust the file: load it with torch and save a slice that is not expanded",
        )
    return info


class _Through(io.RawIOBase):
    """A file whose errors are kept: what is raised within torch's writer comes out as another
    error, or ends the process."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """All of it, or, after an error, none; torch is told that it was."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view) and self.error is None:
            try:
                done += self._put(view[done:])
            except OSError as e:
                self.error = e
        return len(view)

    def _put(self, view: memoryview) -> int:
        return self._file.write(view) or 0


class TorchWriter(SpanWriter):
    """One zip file with an OrderedDict of plain tensors, in the order of the header.

    `ties` are further names, each for a tensor of the header that is saved as the same storage;
    they come last, or where the header has them, and are not written. Tensors wait in a nameless
    file beside `path`, so that the disk needs twice their size and the memory none of it. A state
    dict has no place for metadata: it is ignored, and what has to be kept goes into a file beside
    it, which is the caller's to write.
    """

    container: ClassVar[str] = "torch"

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, TensorInfo],
        metadata: Mapping[str, str],
        ties: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(path, tensors, metadata)
        try:
            import torch  # noqa: F401
        except ImportError:
            raise MissingExtra(f"writing {path}", "torch") from None
        self.ties = dict(ties)
        for name, first in self.ties.items():
            if first in self.ties or self.tensors.get(name, self.tensors.get(first)) != (
                self.tensors.get(first)
            ):
                raise ValueError(f"{name} cannot be tied to {first}")
            self.tensors[name] = self.tensors[first]
            self._lacking[name] = 0
        self._size = 0
        for name, info in self.tensors.items():
            if name not in self.ties:
                self._spans[name] = (Span(self._size, info.nbytes),)
                self._size += info.nbytes + -info.nbytes % _ALIGNMENT
        self._spool = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 - closed in close()
        self._fd = self._spool.fileno()

    def write(self, name: str, array: np.ndarray, region: Region | None = None) -> None:
        if name in self.ties:
            raise ValueError(f"{name} is tied to {self.ties[name]}: write that")
        super().write(name, array, region)

    def _complete(self) -> None:
        import torch

        self._spool.truncate(max(self._size, 1))  # no mapping is empty
        spool = mmap.mmap(self._spool.fileno(), 0)
        by_name: dict[str, torch.Tensor] = {}
        for name, (span,) in self._spans.items():
            info, offset = self.tensors[name], span.offset
            dtype = getattr(torch, dtypes.NAME[info.dtype])
            if info.size:
                flat = torch.frombuffer(spool, dtype=dtype, count=info.size, offset=offset)
                by_name[name] = flat.view(info.shape)
            else:
                by_name[name] = torch.empty(info.shape, dtype=dtype)
        state = OrderedDict((name, by_name[self.ties.get(name, name)]) for name in self.tensors)
        with open(self.path, "xb", buffering=0) as file:
            through = _Through(file)
            torch.save(state, cast(BinaryIO, through))
        if through.error is not None:
            raise through.error

    def sync(self) -> None:
        fsync(self.path)

    def close(self) -> None:
        self._spool.close()
