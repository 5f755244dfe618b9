"""Plans are executed here: the ops on one tensor, contiguous and cast on request.

NumPy copies a transposed array element by element along the slow axis; in blocks that stay in the
cache the same copy is several times faster (measured in scripts/bench/transpose.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zoo.containers import dtypes
from zoo.layout.ops import Ops, run

_BLOCK = 256  # rows and columns of one block
_LINE = 64  # bytes of a cache line
_PAGE = 4096  # columns this many bytes apart fall on the same few cache sets


def apply(ops: Ops, arrays: Sequence[np.ndarray], dtype: str | None = None) -> list[np.ndarray]:
    """The arrays after `ops`, C-contiguous, cast to the dtype code `dtype` where one is given."""
    results = [contiguous(a) for a in run(ops, arrays)]
    return results if dtype is None else [cast(a, dtype) for a in results]


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    """Floating-point arrays rounded to the nearest of `dtype`; others are left as they are."""
    code = dtypes.code_of(array.dtype)
    if code == dtype or not dtypes.is_float(code):
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(dtypes.NUMPY[dtype])


def lost(source: np.ndarray, result: np.ndarray) -> int:
    """How many finite values a cast made infinite or NaN: those outside the dtype's range."""
    if source.dtype == result.dtype:
        return 0
    return int(np.count_nonzero(np.isfinite(source) & ~np.isfinite(result).reshape(source.shape)))


def contiguous(array: np.ndarray) -> np.ndarray:
    """`array` with its elements in C order: itself where they are, else a copy."""
    if array.flags.c_contiguous:
        return array
    bits = array.view(f"u{array.itemsize}") if array.itemsize in (1, 2, 4, 8) else array
    out = np.empty(bits.shape, bits.dtype)
    _copy(bits, out)
    return out.view(array.dtype)


def _copy(source: np.ndarray, out: np.ndarray) -> None:
    """Copy between equal shapes, in blocks over the two axes that are fast on either side."""
    strides = [abs(s) for s in source.strides]
    fast = min(range(source.ndim), key=lambda a: (source.shape[a] == 1, strides[a]))
    last = source.ndim - 1
    if fast == last or source.shape[fast] <= 8 or source.shape[last] <= 8:
        np.copyto(out, source)
        return
    if source.ndim > 2:
        outer = next(a for a in range(source.ndim) if a not in (fast, last))
        for i in range(source.shape[outer]):
            _copy(_at(source, outer, i), _at(out, outer, i))
        return
    collide = strides[last] % _PAGE == 0
    columns = max(1, _LINE // source.itemsize) if collide else _BLOCK
    for i in range(0, source.shape[0], _BLOCK):
        for j in range(0, source.shape[1], columns):
            out[i : i + _BLOCK, j : j + columns] = source[i : i + _BLOCK, j : j + columns]


def _at(array: np.ndarray, axis: int, index: int) -> np.ndarray:
    return array[(slice(None),) * axis + (index,)]
