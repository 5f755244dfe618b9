"""torch's pools over any axes of an array: what `pool_flax` and `channels_first_flax` share.

Sizes are torch's: one number for every axis, or one for each.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from zoo.nn.conv_flax import Sizes, each

Axes = tuple[int, ...]


def max_over(
    x: Array, axes: Axes, kernel: Sizes, stride: Sizes | None, padding: Sizes, ceil: bool
) -> Array:
    """The largest value of every window over `axes`; padding is less than anything."""
    first = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
    windows = _windows(x, axes, kernel, stride, padding, ceil)
    return jax.lax.reduce_window(x, np.asarray(first, x.dtype)[()], jax.lax.max, *windows)


def mean_over(
    x: Array,
    axes: Axes,
    kernel: Sizes,
    stride: Sizes | None,
    padding: Sizes,
    ceil: bool,
    count_include_pad: bool,
) -> Array:
    """The mean of every window over `axes`; padding is zeros, which count if `count_include_pad`.

    What `ceil` adds behind the padding never counts, as in torch.
    """
    window, strides, pads = _windows(x, axes, kernel, stride, padding, ceil)
    counts = np.ones((1,) * x.ndim)
    for axis, p in zip((a % x.ndim for a in axes), each(padding, len(axes)), strict=True):
        size, k, s = x.shape[axis], window[axis], strides[axis]
        behind = pads[axis][1]
        first = np.arange((size + p + behind - k) // s + 1) * s - p
        last = np.minimum(first + k, size + p)
        if not count_include_pad:
            first, last = np.maximum(first, 0), np.minimum(last, size)
        counts = counts * np.expand_dims(last - first, [a for a in range(x.ndim) if a != axis])
    wide = jnp.promote_types(x.dtype, jnp.float32)
    zero = np.zeros((), wide)[()]
    total = jax.lax.reduce_window(x.astype(wide), zero, jax.lax.add, window, strides, pads)
    return (total / counts.astype(wide)).astype(x.dtype)


def adaptive_mean_over(x: Array, axes: Axes, sizes: tuple[int | None, ...]) -> Array:
    """The mean of the windows that torch chooses; None leaves an axis as it is.

    Window i of n over an axis of size s goes from floor(i*s/n) to ceil((i+1)*s/n): windows differ
    in length, overlap where s is not a multiple of n, and repeat where s is less than n.
    """
    for axis, n in zip((a % x.ndim for a in axes), sizes, strict=True):
        size = x.shape[axis]
        if n is None or n == size:
            continue
        windows = [(i * size // n, -(-(i + 1) * size // n)) for i in range(n)]
        means = [jax.lax.slice_in_dim(x, a, b, axis=axis).mean(axis) for a, b in windows]
        x = jnp.stack(means, axis)
    return x


def _windows(
    x: Array, axes: Axes, kernel: Sizes, stride: Sizes | None, padding: Sizes, ceil: bool
) -> tuple[Axes, Axes, list[tuple[int, int]]]:
    """What lax.reduce_window takes: window, strides and padding of every axis of x."""
    n = len(axes)
    window, strides, pads = [1] * x.ndim, [1] * x.ndim, [(0, 0)] * x.ndim
    sizes = (each(kernel, n), each(kernel if stride is None else stride, n), each(padding, n))
    for axis, k, s, p in zip((a % x.ndim for a in axes), *sizes, strict=True):
        size = x.shape[axis]
        over = size + 2 * p - k
        count = (-(-over // s) if ceil else over // s) + 1
        if ceil and (count - 1) * s >= size + p:  # the last window begins inside
            count -= 1
        window[axis], strides[axis] = k, s
        pads[axis] = p, max((count - 1) * s + k - size - p, 0)
    return tuple(window), tuple(strides), pads
