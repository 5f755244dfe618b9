"""Memory that JAX takes over as it is."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from zoo.layout import Shape

Empty = Callable[[Shape, np.dtype], np.ndarray]  # memory for a tensor
_LINE = 64  # bytes to which JAX wants its memory aligned


def aligned(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """An array in memory that JAX takes over without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _LINE, np.uint8)
    start = -raw.ctypes.data % _LINE
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def is_aligned(array: np.ndarray) -> bool:
    """Whether an array is such memory, in C order."""
    return array.flags.c_contiguous and array.ctypes.data % _LINE == 0
