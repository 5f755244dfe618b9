"""Sinusoidal positions (Vaswani 2017, section 3.5)."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike


def sinusoids(positions: Array, limit: int, dim: int, dtype: DTypeLike) -> Array:
    """positions (T,), all below `limit` -> (T, dim), computed in float64; `dim` is even.

    Columns 2i and 2i + 1 at position p are sin and cos of p / 10000^(2i / dim). NumPy makes a table
    of them while JAX traces: without the x64 flag JAX itself has no float64.
    """
    even = np.arange(0, dim, 2, dtype=np.float64)
    angle = np.arange(limit)[:, None] * np.exp(even * (-math.log(10000.0) / dim))
    table = np.stack([np.sin(angle), np.cos(angle)], -1).reshape(limit, dim)
    return jnp.asarray(table.astype(jnp.dtype(dtype)))[positions]
