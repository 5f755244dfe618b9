"""torch.nn.functional.interpolate over any axes of an array."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from zoo.nn.conv_flax import Sizes, each

Axes = tuple[int, ...]


def resized_over(
    x: Array,
    axes: Axes,
    size: Sizes | None,
    scale_factor: Sizes | None,
    mode: str,
    align_corners: bool,
) -> Array:
    """x with `axes` of `size`, or of `scale_factor` (whole numbers) times their sizes.

    ValueError for a mode that is not "nearest", "nearest-exact" or "linear".
    """
    if mode not in ("nearest", "nearest-exact", "linear"):
        raise ValueError(f"mode {mode!r} is neither nearest, nearest-exact nor linear")
    if size is None:
        factors = each(1 if scale_factor is None else scale_factor, len(axes))
        size = tuple(x.shape[a] * f for a, f in zip(axes, factors, strict=True))
    sizes = each(size, len(axes))
    if mode != "linear":
        for axis, m in zip(axes, sizes, strict=True):
            x = jnp.take(x, _nearest(x.shape[axis], m, mode), axis=axis)
        return x
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = x.astype(wide)
    for axis, m in zip(axes, sizes, strict=True):
        y = _linear(y, axis, m, align_corners)
    return y.astype(x.dtype)


def _linear(x: Array, axis: int, m: int, align_corners: bool) -> Array:
    """Each of m outputs between the two of x's elements that it lies between."""
    n = x.shape[axis]
    i = np.arange(m)
    places = i * ((n - 1) / max(m - 1, 1)) if align_corners else (i + 0.5) * (n / m) - 0.5
    places = np.clip(places, 0, n - 1)
    low = np.minimum(np.floor(places).astype(np.int32), n - 1)
    part = (places - low).reshape(-1, *(1,) * (x.ndim - 1 - axis)).astype(x.dtype)
    before, after = jnp.take(x, low, axis), jnp.take(x, np.minimum(low + 1, n - 1), axis)
    return before * (1 - part) + after * part


def _nearest(n: int, m: int, mode: str) -> np.ndarray:
    """Which of n inputs each of m outputs is; torch computes the places in float32."""
    i = np.arange(m, dtype=np.float32)
    places = (i if mode == "nearest" else i + np.float32(0.5)) * np.float32(n / m)
    return np.minimum(np.floor(places).astype(np.int32), n - 1)
