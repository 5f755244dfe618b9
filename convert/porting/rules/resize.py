"""Resizing images and signals, and sampling on a grid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.porting.rules import rule
from convert.porting.rules.promote import cast, opmath, refuse

Scales = Sequence[float | None]


def _sizes(x: Any, size: Any, scales: Any) -> tuple[list[int], list[float | None]]:
    """The new size and the scales that were given, of the `.vec` overloads' arguments."""
    space = x.shape[2:]
    if size is not None:
        return list(size), [None] * len(space)
    return [math.floor(n * s) for n, s in zip(space, scales, strict=True)], list(scales)


def _step(n: int, m: int, scale: float | None) -> float:
    """How far one output is from the next, in inputs."""
    return 1.0 / scale if scale is not None and scale > 0 else n / m


def _nearest(x: Any, size: Sequence[int], scales: Scales, exact: bool) -> Any:
    """torch computes the places in float32, and so does this."""
    for axis, (m, scale) in enumerate(zip(size, scales, strict=True), start=2):
        n = x.shape[axis]
        step = np.float32(_step(n, m, scale))
        at = np.arange(m, dtype=np.float32)
        at = (at + np.float32(0.5)) * step if exact else at * step
        if m == n and scale is None:
            continue
        x = jnp.take(x, np.minimum(np.floor(at).astype(np.int32), n - 1), axis=axis)
    return x


def _places(n: int, m: int, scale: float | None, corners: bool, cubic: bool) -> np.ndarray:
    """Where each output lies among the inputs."""
    i = np.arange(m, dtype=np.float64)
    if corners:
        return i * ((n - 1) / (m - 1) if m > 1 else 0.0)
    at = (i + 0.5) * _step(n, m, scale) - 0.5
    return at if cubic else np.maximum(at, 0)


def _cubic(t: Any, a: float) -> Any:
    """Keys' kernel at distance t (1981)."""
    t = abs(t)
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((t - 5) * t + 8) * t * a - 4 * a
    module = jnp if not isinstance(t, np.ndarray) else np
    return module.where(t <= 1, near, module.where(t < 2, far, 0.0))


def _linear_weights(n: int, m: int, scale: float | None, corners: bool) -> np.ndarray:
    at = _places(n, m, scale, corners, False)
    low = np.minimum(np.floor(at).astype(int), n - 1)
    high = np.minimum(low + 1, n - 1)
    part = np.clip(at - low, 0, 1)
    weights = np.zeros((m, n))
    np.add.at(weights, (np.arange(m), low), 1 - part)
    np.add.at(weights, (np.arange(m), high), part)
    return weights


def _cubic_weights(n: int, m: int, scale: float | None, corners: bool) -> np.ndarray:
    at = _places(n, m, scale, corners, True)
    low = np.floor(at).astype(int)
    weights = np.zeros((m, n))
    for k in range(-1, 3):
        place = np.clip(low + k, 0, n - 1)
        np.add.at(weights, (np.arange(m), place), _cubic(at - (low + k), -0.75))
    return weights


def _smoothed(order: int) -> Callable[..., np.ndarray]:
    """Weights that smooth before they shrink (antialias=True): a filter as wide as the step."""

    def weights_of(n: int, m: int, scale: float | None, corners: bool) -> np.ndarray:
        step = (n - 1) / (m - 1) if corners and m > 1 else 0.0 if corners else _step(n, m, scale)
        support = order / 2 * max(step, 1.0)
        inverse = 1 / step if step >= 1 else 1.0
        weights = np.zeros((m, n))
        for i in range(m):
            center = step * (i + 0.5)
            first = max(int(center - support + 0.5), 0)
            last = min(int(center + support + 0.5), n)
            t = (np.arange(first, last) - center + 0.5) * inverse
            w = _cubic(t, -0.5) if order == 4 else np.maximum(1 - np.abs(t), 0)
            weights[i, first:last] = w / w.sum()
        return weights

    return weights_of


def _resized(
    x: Any, size: Sequence[int], scales: Scales, corners: bool, kind: Callable[..., np.ndarray]
) -> Any:
    """An axis at a time, each by its matrix of weights (outputs, inputs)."""
    y = cast(x, opmath(x.dtype))
    for axis, (m, scale) in enumerate(zip(size, scales, strict=True), start=2):
        n = x.shape[axis]
        weights = jnp.asarray(kind(n, m, scale, corners), y.dtype)
        y = jnp.moveaxis(jnp.tensordot(y, weights, ((axis,), (1,))), -1, axis)
    return cast(y, x.dtype)


def _enter_nearest(name: str, exact: bool) -> None:
    def of_size(x: Any, size: Sequence[int], *scales: float | None, **named: float | None) -> Any:
        return _nearest(x, size, _given(scales, named, len(size)), exact)

    def vec(x: Any, output_size: Any, scale_factors: Any) -> Any:
        return _nearest(x, *_sizes(x, output_size, scale_factors), exact)

    rule(f"aten.{name}.default")(of_size)
    rule(f"aten.{name}.vec")(vec)


def _given(scales: Sequence[float | None], named: dict[str, float | None], n: int) -> Scales:
    """Scales by position or by name: scales, scales_d, scales_h, scales_w."""
    by_name = [named.get(k) for k in ("scales_d", "scales_h", "scales_w")[3 - n :]]
    if n == 1 and "scales" in named:
        return [named["scales"]]
    return [scales[i] if i < len(scales) else by_name[i] for i in range(n)]


def _enter_weighted(name: str, kind: Callable[..., np.ndarray]) -> None:
    def of_size(
        x: Any, output_size: Sequence[int], align_corners: bool,
        *scales: float | None, **named: float | None,
    ) -> Any:  # fmt: skip
        given = _given(scales, named, len(output_size))
        return _resized(x, output_size, given, align_corners, kind)

    def vec(x: Any, output_size: Any, align_corners: bool, scale_factors: Any) -> Any:
        return _resized(x, *_sizes(x, output_size, scale_factors), align_corners, kind)

    rule(f"aten.{name}.default")(of_size)
    rule(f"aten.{name}.vec")(vec)


for _n in (1, 2, 3):
    _enter_nearest(f"upsample_nearest{_n}d", False)
    _enter_nearest(f"_upsample_nearest_exact{_n}d", True)
_enter_weighted("upsample_linear1d", _linear_weights)
_enter_weighted("upsample_bilinear2d", _linear_weights)
_enter_weighted("upsample_trilinear3d", _linear_weights)
_enter_weighted("upsample_bicubic2d", _cubic_weights)
_enter_weighted("_upsample_bilinear2d_aa", _smoothed(2))
_enter_weighted("_upsample_bicubic2d_aa", _smoothed(4))


# -- sampling on a grid -------------------------------------------------------------------------


def _pixel(at: Any, n: int, corners: bool) -> Any:
    """A place in -1 ... 1 as one in pixels."""
    return (at + 1) / 2 * (n - 1) if corners else ((at + 1) * n - 1) / 2


def _reflected(at: Any, low: float, high: float) -> Any:
    if high <= low:
        return jnp.zeros_like(at)
    span = high - low
    at = jnp.abs(at - low)
    extra = at % span
    return jnp.where(jnp.floor(at / span) % 2 == 0, extra + low, span - extra + low)


def _inside(at: Any, n: int, mode: int, corners: bool) -> Any:
    """The place after padding: 0 zeros, 1 border, 2 reflection."""
    if mode == 0:
        return at
    if mode == 2:
        at = _reflected(at, 0, n - 1) if corners else _reflected(at, -0.5, n - 0.5)
    return jnp.where(at < 0, 0, jnp.where(at > n - 1, n - 1, at)).astype(at.dtype)


def _taken(x: Any, places: Sequence[Any]) -> Any:
    """x (N, C, *D) at integer places (N, *O) an axis; 0 outside. -> (N, C, *O)"""
    valid: Any = True
    clipped = []
    for place, n in zip(places, x.shape[2:], strict=True):
        valid = valid & (place >= 0) & (place < n)
        clipped.append(jnp.clip(place, 0, n - 1).astype(np.int32))
    batch = jnp.arange(x.shape[0]).reshape(-1, *(1,) * (places[0].ndim - 1))
    values = jnp.moveaxis(x, 1, -1)[(batch, *clipped)]
    return jnp.moveaxis(jnp.where(valid[..., None], values, 0), -1, 1)


def _sampled_linear(x: Any, places: Sequence[Any]) -> Any:
    lows = [jnp.floor(p) for p in places]
    total: Any = 0
    for corner in itertools.product((0, 1), repeat=len(places)):
        weight: Any = 1
        for p, low, c in zip(places, lows, corner, strict=True):
            weight = weight * ((p - low) if c else (1 - (p - low)))
        at = [low + c for low, c in zip(lows, corner, strict=True)]
        total = total + _taken(x, at) * weight[:, None]
    return total


def _sampled_cubic(x: Any, places: Sequence[Any], mode: int, corners: bool) -> Any:
    lows = [jnp.floor(p) for p in places]
    total: Any = 0
    for offsets in itertools.product(range(-1, 3), repeat=2):
        weight: Any = 1
        at = []
        for p, low, o, n in zip(places, lows, offsets, x.shape[2:], strict=True):
            weight = weight * _cubic(p - (low + o), -0.75)
            at.append(jnp.round(_inside(low + o, n, mode, corners)))
        total = total + _taken(x, at) * weight[:, None]
    return total


@rule(
    "aten.grid_sampler.default",
    "aten.grid_sampler_2d.default",
    "aten.grid_sampler_3d.default",
)
def grid_sampler(
    x: Any, grid: Any, interpolation_mode: int, padding_mode: int, align_corners: bool
) -> Any:
    """x (N, C, *D), grid (N, *O, axes) whose last axis names x's last one first."""
    space = x.shape[2:]
    raw = [_pixel(grid[..., -1 - i], n, align_corners) for i, n in enumerate(space)]
    if interpolation_mode == 2:
        if len(space) != 2:
            raise refuse("a bicubic grid_sampler of three axes")
        return _sampled_cubic(x, raw, padding_mode, align_corners)
    pairs = zip(raw, space, strict=True)
    places = [_inside(p, n, padding_mode, align_corners) for p, n in pairs]
    if interpolation_mode == 1:
        return _taken(x, [jnp.round(p) for p in places])
    return _sampled_linear(x, places)


@rule("aten.affine_grid_generator.default")
def affine_grid_generator(theta: Any, size: Sequence[int], align_corners: bool) -> Any:
    def line(n: int) -> np.ndarray:
        if n <= 1:
            return np.zeros(n)
        span = np.linspace(-1, 1, n)
        return span if align_corners else span * (n - 1) / n

    axes = np.meshgrid(*(line(n) for n in size[2:]), indexing="ij")
    base = np.stack([*axes[::-1], np.ones_like(axes[0])], axis=-1)
    return jnp.einsum("...j,nij->n...i", jnp.asarray(base, theta.dtype), theta)
