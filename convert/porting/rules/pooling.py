"""Pools: the largest or the mean of windows, of a fixed size or of a fixed number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from convert.porting.rules import rule
from convert.porting.rules.convolution import tupled
from convert.porting.rules.promote import cast, extremes, opmath


def _outputs(size: int, k: int, s: int, p: int, d: int, ceil: bool) -> tuple[int, int]:
    """How many windows there are, and the padding that their last one needs behind."""
    over = size + 2 * p - d * (k - 1) - 1
    count = (-(-over // s) if ceil else over // s) + 1
    if ceil and (count - 1) * s >= size + p:  # torch: the last one begins inside
        count -= 1
    return count, max((count - 1) * s + d * (k - 1) + 1 - size - p, 0)


def _settings(n: int, kernel: Any, stride: Any, *others: Any) -> list[tuple[int, ...]]:
    kernel = tupled(kernel, n)
    empty = stride is None or (isinstance(stride, list | tuple) and not stride)
    return [kernel, kernel if empty else tupled(stride, n), *(tupled(o, n) for o in others)]


def _max_places(
    size: int, k: int, s: int, p: int, d: int, ceil: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Places (outputs, k) of the windows along an axis, and which of them lie inside."""
    count, _ = _outputs(size, k, s, p, d, ceil)
    places = np.arange(count)[:, None] * s - p + np.arange(k) * d
    return np.clip(places, 0, max(size - 1, 0)), (places >= 0) & (places < size)


def _largest_of_places(x: Any, axes: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[Any, Any]:
    """The largest value, and its place in the flattened axes, of windows given axis by axis."""
    n = len(axes)
    space = x.shape[-n:]
    lead = x.shape[:-n]
    flat: Any = np.zeros((), np.int64)
    inside: Any = np.ones((), bool)
    for i, (places, valid) in enumerate(axes):
        shape = [1] * (2 * n)
        shape[i], shape[n + i] = places.shape
        flat = flat + places.reshape(shape) * math.prod(space[i + 1 :])
        inside = inside & valid.reshape(shape)
    outputs, window = flat.shape[:n], math.prod(flat.shape[n:])
    flat, inside = flat.reshape(*outputs, window), inside.reshape(*outputs, window)
    taken = jnp.take(x.reshape(*lead, -1), jnp.asarray(flat), axis=len(lead))
    best = jnp.argmax(jnp.where(inside, taken, extremes(x.dtype)[0]), axis=-1)
    # A window all of -inf must not name a place outside.
    values = jnp.take_along_axis(taken, best[..., None], -1)[..., 0]
    index = jnp.take_along_axis(jnp.broadcast_to(flat, taken.shape), best[..., None], -1)[..., 0]
    return values, cast(index, np.int64)


def _max_pool(
    n: int, x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool
) -> Any:
    settings = _settings(n, kernel, stride, padding, dilation)
    kernel, stride, padding, dilation = settings
    if any(d > 1 for d in dilation):  # lax has no gradient of it
        return _max_pool_with_indices(n, x, kernel, stride, padding, dilation, ceil)[0]
    space = x.shape[-n:]
    behind = [
        _outputs(size, k, s, p, 1, ceil)[1]
        for size, k, s, p in zip(space, kernel, stride, padding, strict=True)
    ]
    lead = x.ndim - n
    pads = [(0, 0)] * lead + list(zip(padding, behind, strict=True))
    return lax.reduce_window(
        x,
        extremes(x.dtype)[0],
        lax.max,
        (1,) * lead + kernel,
        (1,) * lead + stride,
        pads,
    )


def _max_pool_with_indices(
    n: int, x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool
) -> tuple[Any, Any]:
    settings = _settings(n, kernel, stride, padding, dilation)
    parts = zip(x.shape[-n:], *settings, strict=True)
    return _largest_of_places(x, [_max_places(a, b, c, d, e, ceil) for a, b, c, d, e in parts])


def _average_pool(
    n: int,
    x: Any,
    kernel: Any,
    stride: Any,
    padding: Any,
    ceil: bool,
    include_pad: bool,
    divisor: int | None,
) -> Any:
    kernel, stride, padding = _settings(n, kernel, stride, padding)
    lead = x.ndim - n
    counts: Any = np.ones(())
    pads = []
    for i, (size, k, s, p) in enumerate(zip(x.shape[-n:], kernel, stride, padding, strict=True)):
        count, behind = _outputs(size, k, s, p, 1, ceil)
        pads.append((p, behind))
        first = np.arange(count) * s - p
        last = np.minimum(first + k, size + p)  # what ceil_mode adds never counts
        if not include_pad:
            first, last = np.maximum(first, 0), np.minimum(last, size)
        counts = counts * (last - first).reshape([-1 if a == i else 1 for a in range(n)])
    dtype = opmath(x.dtype)
    total = lax.reduce_window(
        cast(x, dtype),
        np.zeros((), dtype)[()],
        lax.add,
        (1,) * lead + kernel,
        (1,) * lead + stride,
        [(0, 0)] * lead + pads,
    )
    return cast(total / jnp.asarray(divisor or counts, dtype), x.dtype)


def _evenly(size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last but one of `count` windows that cover an axis, as torch lays them."""
    i = np.arange(count)
    return i * size // count, -(-(i + 1) * size // count)


def _adaptive_average(x: Any, sizes: Sequence[int | None]) -> Any:
    n = len(sizes)
    wider = cast(x, opmath(x.dtype))
    for axis, count in zip(range(x.ndim - n, x.ndim), sizes, strict=True):
        size = x.shape[axis]
        if count is None or count == size:
            continue
        if count and size % count == 0:
            shape = (*wider.shape[:axis], count, size // count, *wider.shape[axis + 1 :])
            wider = jnp.mean(wider.reshape(shape), axis=axis + 1)
            continue
        first, last = _evenly(size, count)
        place = np.arange(size)
        inside = (place >= first[:, None]) & (place < last[:, None])
        weights = jnp.asarray(inside / (last - first)[:, None], wider.dtype)
        wider = jnp.moveaxis(jnp.tensordot(wider, weights, ((axis,), (1,))), -1, axis)
    return cast(wider, x.dtype)


def _adaptive_max(x: Any, sizes: Sequence[int]) -> tuple[Any, Any]:
    n = len(sizes)
    axes = []
    for size, count in zip(x.shape[-n:], sizes, strict=True):
        first, last = _evenly(size, count)
        places = first[:, None] + np.arange((last - first).max(initial=1))
        axes.append((np.minimum(places, size - 1), places < last[:, None]))
    return _largest_of_places(x, axes)


Pool = Callable[..., Any]


def _enter(n: int) -> None:
    """The pools of n axes."""

    def max_pool(
        x: Any,
        kernel: Any,
        stride: Any = (),
        padding: Any = 0,
        dilation: Any = 1,
        ceil: bool = False,
    ) -> Any:
        return _max_pool(n, x, kernel, stride, padding, dilation, ceil)

    def with_indices(
        x: Any,
        kernel: Any,
        stride: Any = (),
        padding: Any = 0,
        dilation: Any = 1,
        ceil: bool = False,
    ) -> Any:
        return _max_pool_with_indices(n, x, kernel, stride, padding, dilation, ceil)

    def average(
        x: Any,
        kernel: Any,
        stride: Any = (),
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        return _average_pool(
            n, x, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override
        )

    def adaptive(x: Any, output_size: Any) -> Any:
        return _adaptive_average(x, tupled(output_size, n))

    def adaptive_max(x: Any, output_size: Any) -> Any:
        return _adaptive_max(x, tupled(output_size, n))

    rule(f"aten.max_pool{n}d.default")(max_pool)
    rule(f"aten.max_pool{n}d_with_indices.default")(with_indices)
    rule(f"aten.avg_pool{n}d.default")(average)
    rule(f"aten.adaptive_avg_pool{n}d.default")(adaptive)
    if n > 1:
        rule(f"aten._adaptive_avg_pool{n}d.default")(adaptive)
    rule(f"aten.adaptive_max_pool{n}d.default")(adaptive_max)


for _n in (1, 2, 3):
    _enter(_n)


@rule("aten.max_unpool2d.default")
def max_unpool2d(x: Any, indices: Any, output_size: Sequence[int]) -> Any:
    lead = x.shape[:-2]
    size = math.prod(output_size)
    rows = math.prod(lead)
    flat = jnp.zeros((rows, size), x.dtype)
    at = flat.at[jnp.arange(rows)[:, None], indices.reshape(rows, indices.size // max(rows, 1))]
    values = x.reshape(rows, x.size // max(rows, 1))
    # Where two go to one place, the last one stays, and torch gives both the gradient.
    every = at.add(values)
    flat = lax.stop_gradient(at.set(values) - every) + every
    return flat.reshape(*lead, *output_size)
