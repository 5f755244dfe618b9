"""torch.nn.functional.interpolate over any axes of an array."""

from __future__ import annotations

import jax
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
    shape = list(x.shape)
    scales = []
    for axis, m in zip(axes, sizes, strict=True):
        n = shape[axis]
        # A single output is the first input where corners are aligned: as a scale, very large.
        scales.append(m / n if not align_corners else (m - 1) / max(n - 1, 1) or float(n + 1))
        shape[axis] = m
    moved = [0.5 - 0.5 * s if align_corners else 0.0 for s in scales]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    scale, translation = jnp.asarray(scales, wide), jnp.asarray(moved, wide)
    y = jax.image.scale_and_translate(
        x.astype(wide), tuple(shape), axes, scale, translation, "linear", antialias=False
    )
    return y.astype(x.dtype)


def _nearest(n: int, m: int, mode: str) -> np.ndarray:
    """Which of n inputs each of m outputs is; torch computes the places in float32."""
    i = np.arange(m, dtype=np.float32)
    places = (i if mode == "nearest" else i + np.float32(0.5)) * np.float32(n / m)
    return np.minimum(np.floor(places).astype(np.int32), n - 1)
