"""Copies between memory orders, in blocks that stay in the cache.

NumPy copies a transposed array element by element along the slow axis; in blocks of 16 by 1024 the
same copy is four to ten times as fast (measured in scripts/bench/transpose.py). Smaller blocks are
as good on one thread, but two then wait for each other: every call lets go of Python's lock.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from zoo.containers.regions import Region
from zoo.containers.scratch import Scratch

_STRIP = 1 << 21  # bytes that are brought into order at a time
_ROWS = 1024  # of a block at most, along the source's fast axis
_COLUMNS = 16  # of a block, along the other's; more where rows are short
_SHORT = 4096  # elements of a block of short rows
_NARROW = 8  # axes no longer than this stay inside a block


def contiguous(array: np.ndarray) -> np.ndarray:
    """`array` with its elements in C order: itself where they are, else a copy."""
    if array.flags.c_contiguous:
        return array
    out = np.empty(array.shape, array.dtype)
    copy(array, out)
    return out


_scratch = Scratch()


def ordered(array: np.ndarray) -> np.ndarray:
    """`array` with its elements in C order: itself where they are, else a copy that the thread's
    next call overwrites."""
    if array.flags.c_contiguous:
        return array
    out = _scratch.least(array.nbytes).view(array.dtype).reshape(array.shape)
    copy(array, out)
    return out


def strips(array: np.ndarray, region: Region) -> Iterator[tuple[np.ndarray, Region]]:
    """An array that is a region of a tensor, as it is where it lies in order; else in strips that
    stay in the cache, each with its own region."""
    if not array.size:
        return
    if array.flags.c_contiguous or array.nbytes <= _STRIP:
        yield array, region
        return
    axis = next(a for a, n in enumerate(array.shape) if n > 1)
    n = array.shape[axis]
    step = max(1, _STRIP // (array.nbytes // n))
    before = (slice(None),) * axis
    for i in range(0, n, step):
        start, stop = region[axis].start + i, region[axis].start + min(i + step, n)
        part = (*region[:axis], slice(start, stop), *region[axis + 1 :])
        yield from strips(array[(*before, slice(i, i + step))], part)


def copy(source: np.ndarray, out: np.ndarray) -> None:
    """Copy between arrays of one shape and dtype, in any memory orders."""
    bits = np.dtype(f"u{source.itemsize}") if source.itemsize in (1, 2, 4, 8) else source.dtype
    _copy(source.view(bits), out.view(bits))


def _copy(source: np.ndarray, out: np.ndarray) -> None:
    """In blocks over the two wide axes that are fast on either side."""
    wide = [a for a, n in enumerate(source.shape) if n > _NARROW]
    row = min(wide, key=lambda a: abs(source.strides[a]), default=0)
    column = min(wide, key=lambda a: abs(out.strides[a]), default=0)
    if row == column:
        np.copyto(out, source)
        return
    if outer := [a for a in wide if a not in (row, column)]:
        for i in range(source.shape[outer[0]]):
            _copy(_cut(source, outer[0], i, 1), _cut(out, outer[0], i, 1))
        return
    rows = min(_ROWS, source.shape[row])
    columns = max(_COLUMNS, min(4 * _COLUMNS, _SHORT // rows))
    for i in range(0, source.shape[row], rows):
        strip, into = _cut(source, row, i, rows), _cut(out, row, i, rows)
        for j in range(0, source.shape[column], columns):
            np.copyto(_cut(into, column, j, columns), _cut(strip, column, j, columns))


def _cut(array: np.ndarray, axis: int, start: int, length: int) -> np.ndarray:
    return array[(slice(None),) * axis + (slice(start, start + length),)]
