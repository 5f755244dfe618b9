"""Plans are executed here: the ops on one tensor, contiguous and cast on request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zoo.containers import dtypes
from zoo.containers.strided import contiguous
from zoo.layout.ops import Ops, run


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
