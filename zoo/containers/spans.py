"""Containers whose tensors lie row-major in files: what reading and writing regions of them takes.

A tensor is a sequence of spans, each a stretch of a file. Regions are read and written stretch by
stretch, by pread and pwrite, so that several threads may work in one file at once.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zoo.containers import dtypes
from zoo.containers.base import Reader, TensorInfo, Writer, fill, put
from zoo.containers.regions import Region, extent, runs, whole
from zoo.containers.strided import ordered, strips

_SHORT = 32 << 10  # bytes of a piece whose call takes longer than its bytes
_OPEN = 64  # files that one worker has open at a time
_LIKELY = 1 << 20  # bytes from which the disk is told to begin


@dataclass(frozen=True, slots=True)
class Span:
    """`nbytes` at `offset` of a file: the checkpoint itself, or `file` inside its directory."""

    offset: int
    nbytes: int
    file: str = ""


Spans = Sequence[Span]


def pieces(spans: Spans, start: int, nbytes: int) -> Iterator[tuple[str, int, int]]:
    """The file, offset and length of each piece of a tensor's bytes from `start` on."""
    for span in spans:
        if nbytes <= 0:
            return
        if start < span.nbytes:
            length = min(nbytes, span.nbytes - start)
            yield span.file, span.offset + start, length
            start, nbytes = start + length, nbytes - length
        start -= span.nbytes


class Opened:
    """Descriptors of the files that spans name, while they are read or written: opened once, and
    closed together. A checkpoint's own file stays open, and so do shards."""

    def __init__(self, owner: SpanReader | SpanWriter, flags: int) -> None:
        self._owner, self._flags = owner, flags
        self._mine: dict[str, int] = {}

    def __getitem__(self, file: str) -> int:
        held = self._owner.descriptor(file)
        if held is not None:
            return held
        if file not in self._mine:
            if len(self._mine) >= _OPEN:
                self.close()
            self._mine[file] = os.open(self._owner.path / file, self._flags)
        return self._mine[file]

    def close(self) -> None:
        """Close what was opened here."""
        while self._mine:
            os.close(self._mine.popitem()[1])


class SpanReader(Reader):
    """A Reader that knows where each tensor's bytes lie. `_fd` is the checkpoint, where it is one
    file; else it stays below zero, and files are opened when they are read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._fd = -1
        self._spans: dict[str, Spans] = {}
        self._short = threading.Lock()

    def spans(self, name: str) -> Spans | None:
        """Where the tensor lies; None where its bytes are not row-major, or not as they are."""
        return self._spans.get(name)

    def file_of(self, file: str) -> Path:
        """The file that a span names."""
        return self.path / file if file else self.path

    def stretches(self) -> Iterator[tuple[Path, int, int]]:
        """Every file, offset and length in which bytes of a tensor lie as they are."""
        for name in self.tensors:
            for span in self.spans(name) or ():
                yield self.file_of(span.file), span.offset, span.nbytes

    def vouch(self, name: str) -> None:
        """CorruptInput where the file has a checksum of the tensor and other bytes: for whoever
        takes the bytes where they lie, past `read`."""

    def descriptor(self, file: str) -> int | None:
        """The descriptor of a span's file, where it is open all the time."""
        return None if file else self._fd

    def read(
        self, name: str, region: Region | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        info, spans = self.tensors[name], self.spans(name) or ()
        region = whole(info.shape) if region is None else region
        dtype = dtypes.NUMPY[info.dtype]
        out = np.empty(extent(region), dtype) if out is None else out
        view = out.reshape(-1).view(np.uint8).data if out.size else memoryview(b"")
        length, starts = runs(info.shape, region)
        done, nbytes, what = 0, length * dtype.itemsize, f"{self.path}: {name}"
        with closing(Opened(self, os.O_RDONLY)) as opened:
            if len(spans) == 1 and nbytes < _SHORT:
                offsets = (spans[0].offset + start * dtype.itemsize for start in starts)
                self._read_short(opened[spans[0].file], view, nbytes, offsets, what)
                return out
            for start in starts:
                for file, offset, n in pieces(spans, start * dtype.itemsize, nbytes):
                    fill(opened[file], view[done : done + n], offset, what)
                    done += n
        return out

    def _read_short(
        self, fd: int, view: memoryview, nbytes: int, offsets: Iterable[int], what: str
    ) -> None:
        """Many pieces of a few bytes, one thread at a time: each call lets another thread run, and
        two that do this only wait for each other."""
        done = 0
        with self._short:
            for offset in offsets:
                piece = view[done : done + nbytes]
                if os.preadv(fd, (piece,), offset) != nbytes:
                    fill(fd, piece, offset, what)
                done += nbytes

    def state(self) -> object:
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class SpanWriter(Writer):
    """A Writer that knows where each tensor's bytes go. Files are as `SpanReader`'s."""

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
    ) -> None:
        super().__init__(path, tensors, metadata)
        self._fd = -1
        self._spans: dict[str, Spans] = {}
        # The kernel lets one thread at a time write to a file; the others would spin, not sleep.
        self._writing = threading.Lock()

    def _create(self, nbytes: int, resumed: bool) -> None:
        """The checkpoint's one file, of so many bytes; `resumed`: which may be there already."""
        flags = os.O_WRONLY | os.O_CREAT | (0 if resumed else os.O_EXCL)
        self._fd = os.open(self.path, flags, 0o666)
        os.truncate(self._fd, nbytes)

    def descriptor(self, file: str) -> int | None:
        """The descriptor of a span's file, where it is open all the time."""
        return None if file else self._fd

    def place(self, name: str) -> tuple[str, int]:
        """Where the tensor begins: to write in this order is to write files from front to back."""
        first = self._spans[name][0] if self._spans[name] else Span(0, 0)
        return first.file, first.offset

    def _write(self, name: str, array: np.ndarray, region: Region) -> None:
        info = self.tensors[name]
        for block, part in strips(array, region):
            length, starts = runs(info.shape, part)
            self._put(name, ordered(block), length * array.itemsize, starts)

    def _put(self, name: str, block: np.ndarray, nbytes: int, starts: Iterable[int]) -> None:
        view = block.reshape(-1).view(np.uint8).data
        done, spans, itemsize = 0, self._spans[name], block.itemsize
        with closing(Opened(self, os.O_WRONLY)) as opened:
            for start in starts:
                for file, offset, n in pieces(spans, start * itemsize, nbytes):
                    with self._writing:
                        put(opened[file], view[done : done + n], offset)
                    if n >= _LIKELY:
                        begin_writing(opened[file], offset, n)
                    done += n

    def _copy(self, name: str, reader: Reader, source: str, region: Region) -> bool:
        theirs = reader.spans(source) if isinstance(reader, SpanReader) else None
        if theirs is None or not isinstance(reader, SpanReader):
            return False
        reader.vouch(source)
        info = self.tensors[name]
        itemsize = dtypes.itemsize(info.dtype)
        length, starts = runs(info.shape, region)
        with (
            closing(Opened(reader, os.O_RDONLY)) as sources,
            closing(Opened(self, os.O_WRONLY)) as targets,
        ):
            for start in starts:
                done = start * itemsize
                for file, offset, n in pieces(theirs, done, length * itemsize):
                    for to, at, m in pieces(self._spans[name], done, n):
                        if not _copied(sources[file], offset, targets[to], at, m):
                            return False
                        begin_writing(targets[to], at, m)
                        offset, done = offset + m, done + m
        return True

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _copied(source: int, start: int, target: int, offset: int, nbytes: int) -> bool:
    """Whether the kernel could copy between these files by itself; if not, nothing is said of what
    it has written."""
    while nbytes:
        try:
            n = os.copy_file_range(source, target, nbytes, start, offset)
        except OSError:
            return False
        if n == 0:
            return False
        start, offset, nbytes = start + n, offset + n, nbytes - n
    return True


def begin_writing(fd: int, offset: int, nbytes: int) -> None:
    """Have the disk begin with what was written, so that the last sync is short. Only a hint."""
    if _sync_file_range is not None:
        _sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(nbytes), 2)  # 2: WRITE


_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
