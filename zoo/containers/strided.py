"""Copies between memory orders, in blocks that stay in the cache.

NumPy copies a transposed array element by element along the slow axis; in strips of 16 rows the
same copy is four to ten times as fast (measured in scripts/bench/transpose.py).
"""

from __future__ import annotations

import numpy as np

_ROWS, _COLUMNS = 256, 16  # of one block of the result
_NARROW = 8  # axes no longer than this stay inside a block


def contiguous(array: np.ndarray) -> np.ndarray:
    """`array` with its elements in C order: itself where they are, else a copy."""
    if array.flags.c_contiguous:
        return array
    out = np.empty(array.shape, array.dtype)
    copy(array, out)
    return out


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
    for i in range(0, source.shape[row], _ROWS):
        strip, into = _cut(source, row, i, _ROWS), _cut(out, row, i, _ROWS)
        for j in range(0, source.shape[column], _COLUMNS):
            np.copyto(_cut(into, column, j, _COLUMNS), _cut(strip, column, j, _COLUMNS))


def _cut(array: np.ndarray, axis: int, start: int, length: int) -> np.ndarray:
    return array[(slice(None),) * axis + (slice(start, start + length),)]
