"""Sums, means, extremes, cumulative operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from convert.porting.rules import rule, rules_of
from convert.porting.rules.pairwise import logaddexp
from convert.porting.rules.promote import (
    cast,
    category,
    floating_of,
    floats,
    opmath,
    real_of,
    sum_dtype,
    wide,
)


def axes_of(dim: Any, ndim: int) -> tuple[int, ...]:
    """The axes that a reduction is over: all where none are named."""
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return tuple(range(ndim))
    dims = dim if isinstance(dim, list | tuple) else (dim,)
    return tuple(d % ndim for d in dims) if ndim else ()


def _wider(x: Any, dtype: Any) -> Any:
    """x to be summed up as the dtype: 16 bits in 32."""
    return cast(cast(x, dtype), opmath(dtype))


@rule("aten.sum.default", "aten.sum.dim_IntList")
def sum_(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    dtype = np.dtype(sum_dtype(x.dtype) if dtype is None else dtype)
    total = jnp.sum(_wider(x, dtype), axis=axes_of(dim, x.ndim), keepdims=keepdim)
    return cast(total, dtype)


@rule("aten.nansum.default")
def nansum(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    return sum_(jnp.where(jnp.isnan(x), 0, x), dim, keepdim, dtype=dtype)


@rule("aten.mean.default", "aten.mean.dim")
def mean(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    dtype = np.dtype(x.dtype if dtype is None else dtype)
    found = jnp.mean(_wider(x, dtype), axis=axes_of(dim, x.ndim), keepdims=keepdim)
    return cast(found, dtype)


@rule("aten.nanmean.default")
def nanmean(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    count = jnp.sum(~jnp.isnan(x), axis=axes_of(dim, x.ndim), keepdims=keepdim)
    return cast(nansum(x, dim, keepdim, dtype=dtype) / count, x.dtype if dtype is None else dtype)


@rule("aten.prod.default")
def prod(x: Any, *, dtype: Any = None) -> Any:
    dtype = sum_dtype(x.dtype) if dtype is None else dtype
    return cast(jnp.prod(_wider(x, dtype)), dtype)


@rule("aten.prod.dim_int")
def prod_dim(x: Any, dim: int, keepdim: bool = False, *, dtype: Any = None) -> Any:
    dtype = sum_dtype(x.dtype) if dtype is None else dtype
    axes = axes_of(dim, x.ndim)
    return cast(jnp.prod(_wider(x, dtype), axis=axes, keepdims=keepdim), dtype)


def _moments(x: Any, dim: Any, unbiased: bool, correction: Any, keepdim: bool) -> tuple[Any, Any]:
    """Mean and variance, with the divisor n - correction that is 0 at the least."""
    axes = axes_of(dim, x.ndim)
    correction = (1 if unbiased else 0) if correction is None else correction
    wider = cast(x, opmath(x.dtype))
    n = int(np.prod([x.shape[a] for a in axes]))
    center = jnp.mean(wider, axis=axes, keepdims=True)
    squares = jnp.sum(jnp.square(jnp.abs(wider - center)), axis=axes, keepdims=keepdim)
    left = max(n - correction, 0)
    variance = squares / left if left else squares / jnp.zeros((), squares.dtype)
    return (center if keepdim else jnp.squeeze(center, axes)), variance


def _spread(root: bool, with_mean: bool) -> list[tuple[str, Callable[..., Any]]]:
    """The overloads of var, std, var_mean, std_mean, which take their arguments differently."""

    def compute(x: Any, dim: Any, unbiased: bool, correction: Any, keepdim: bool) -> Any:
        center, variance = _moments(x, dim, unbiased, correction, keepdim)
        spread = cast(jnp.sqrt(variance) if root else variance, real_of(x.dtype))
        return (spread, cast(center, x.dtype)) if with_mean else spread

    def default(x: Any, unbiased: bool = True) -> Any:
        return compute(x, None, unbiased, None, False)

    def of_dim(x: Any, dim: Any = None, unbiased: bool = True, keepdim: bool = False) -> Any:
        return compute(x, dim, unbiased, None, keepdim)

    def corrected(x: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
        return compute(x, dim, True, correction, keepdim)

    return [("default", default), ("dim", of_dim), ("correction", corrected)]


for _name, _root, _with in (
    ("var", False, False),
    ("std", True, False),
    ("var_mean", False, True),
    ("std_mean", True, True),
):
    for _overload, _function in _spread(_root, _with):
        rule(f"aten.{_name}.{_overload}")(_function)


# -- extremes -----------------------------------------------------------------------------------


def _index_of(x: Any, dim: Any, keepdim: bool, largest: bool) -> Any:
    """torch's index of an extreme: the first one, or the first NaN."""
    x = cast(x, np.int32) if x.dtype == np.bool_ else x
    if dim is None:
        index = (jnp.argmax if largest else jnp.argmin)(x.reshape(-1))
        return cast(index.reshape((1,) * x.ndim) if keepdim else index, np.int64)
    if not x.ndim:
        return cast(jnp.zeros((), np.int32), np.int64)
    return cast((jnp.argmax if largest else jnp.argmin)(x, axis=dim, keepdims=keepdim), np.int64)


@rule("aten.argmax.default")
def argmax(x: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    return _index_of(x, dim, keepdim, True)


@rule("aten.argmin.default")
def argmin(x: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    return _index_of(x, dim, keepdim, False)


def picked(x: Any, index: Any, dim: int, keepdim: bool) -> Any:
    """The values at an index that kept its axis; without it unless it is kept."""
    values = jnp.take_along_axis(x, index, dim)
    return values if keepdim else jnp.squeeze(values, dim)


def _extreme_at(largest: bool) -> Callable[..., Any]:
    def at(x: Any, dim: int, keepdim: bool = False) -> tuple[Any, Any]:
        if not x.ndim:
            return x, cast(jnp.zeros((), np.int32), np.int64)
        index = _index_of(x, dim, True, largest)
        return picked(x, index, dim, keepdim), index if keepdim else jnp.squeeze(index, dim)

    return at


rule("aten.max.dim")(_extreme_at(True))
rule("aten.min.dim")(_extreme_at(False))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _greatest(x: Any, axes: tuple[int, ...]) -> Any:
    """The maximum, its axes kept. JAX's own derivative compares x with it: XLA on the CPU may
    compute x a second time for that, rounded otherwise, and then finds the maximum nowhere."""
    return jnp.max(x, axis=axes, keepdims=True)


@_greatest.defjvp
def _greatest_jvp(axes: tuple[int, ...], primals: Any, tangents: Any) -> Any:
    (x,), (t,) = primals, tangents
    rest = [d for d in range(x.ndim) if d not in axes]
    shape = [x.shape[d] for d in rest]
    x, t = (a.transpose(*rest, *axes).reshape(*shape, -1) for a in (x, t))
    first = jnp.argmax(x, axis=-1, keepdims=True)
    best = jnp.take_along_axis(x, first, -1)
    share = (x == best) | (lax.broadcasted_iota(first.dtype, x.shape, x.ndim - 1) == first)
    moved = jnp.where(share, t, 0).sum(-1) / share.sum(-1).astype(t.dtype)
    return jnp.expand_dims(best[..., 0], axes), jnp.expand_dims(moved, axes)


@rule("aten.amax.default")
def amax(x: Any, dim: Any = (), keepdim: bool = False) -> Any:
    axes = axes_of(dim, x.ndim)
    if category(x.dtype) != 2 or not axes or not x.size:
        return jnp.max(x, axis=axes, keepdims=keepdim)
    found = _greatest(x, tuple(sorted(axes)))
    return found if keepdim else jnp.squeeze(found, axes)


@rule("aten.amin.default")
def amin(x: Any, dim: Any = (), keepdim: bool = False) -> Any:
    if category(x.dtype) != 2:
        return jnp.min(x, axis=axes_of(dim, x.ndim), keepdims=keepdim)
    return -amax(-x, dim, keepdim)


rules_of([("max", amax), ("min", amin)])


@rule("aten.aminmax.default")
def aminmax(x: Any, *, dim: int | None = None, keepdim: bool = False) -> tuple[Any, Any]:
    return amin(x, dim, keepdim), amax(x, dim, keepdim)


def _all_or_any(function: Callable[..., Any]) -> Callable[..., Any]:
    def reduce(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
        axes = () if isinstance(dim, list | tuple) and not dim else axes_of(dim, x.ndim)
        found = function(x != 0, axis=axes, keepdims=keepdim)
        return cast(found, np.uint8) if x.dtype == np.uint8 else found

    return reduce


rules_of([("all", _all_or_any(jnp.all)), ("any", _all_or_any(jnp.any))], "default", "dim", "dims")


@rule("aten.count_nonzero.default", "aten.count_nonzero.dim_IntList")
def count_nonzero(x: Any, dim: Any = None) -> Any:
    return cast(jnp.sum(x != 0, axis=axes_of(dim, x.ndim)), np.int64)


@rule("aten.logsumexp.default", "aten.special_logsumexp.default")
def logsumexp(x: Any, dim: Any, keepdim: bool = False) -> Any:
    x = cast(x, floating_of(x.dtype))
    axes = axes_of(dim, x.ndim)
    return wide(lambda x: jax.scipy.special.logsumexp(x, axis=axes, keepdims=keepdim))(x)


# -- cumulative ---------------------------------------------------------------------------------


def _cumulative(x: Any, dim: int, dtype: Any, function: Callable[..., Any]) -> Any:
    dtype = sum_dtype(x.dtype) if dtype is None else dtype
    x = _wider(x, dtype)
    return cast(function(x, axis=dim) if x.ndim else x, dtype)


@rule("aten.cumsum.default")
def cumsum(x: Any, dim: int, *, dtype: Any = None) -> Any:
    return _cumulative(x, dim, dtype, jnp.cumsum)


@rule("aten.cumprod.default")
def cumprod(x: Any, dim: int, *, dtype: Any = None) -> Any:
    return _cumulative(x, dim, dtype, jnp.cumprod)


@rule("aten.logcumsumexp.default")
def logcumsumexp(x: Any, dim: int) -> Any:
    if category(x.dtype) == 3 and x.size and x.ndim:
        moved = jnp.moveaxis(x, dim, 0)  # one after the other, as torch's angles add up
        _, rest = lax.scan(lambda a, b: (logaddexp(a, b),) * 2, moved[0], moved[1:])
        return jnp.moveaxis(jnp.concatenate([moved[:1], rest]), 0, dim)
    return wide(lambda x: lax.cumlogsumexp(x, axis=dim % x.ndim) if x.ndim else x)(x)


def _cumulative_extreme(largest: bool) -> Callable[..., Any]:
    """Values and the index of the last one that is as great."""

    def compute(x: Any, dim: int) -> tuple[Any, Any]:
        if not x.ndim:
            return x, cast(jnp.zeros((), np.int32), np.int64)
        dim %= x.ndim
        plain = cast(x, np.int32) if x.dtype == np.bool_ else x
        best = (lax.cummax if largest else lax.cummin)(lax.stop_gradient(plain), axis=dim)
        here = (plain == best) | (jnp.isnan(plain) if category(x.dtype) == 2 else False)
        position = lax.broadcasted_iota(np.int32, x.shape, dim)
        index = cast(lax.cummax(jnp.where(here, position, 0), axis=dim), np.int64)
        return jnp.take_along_axis(x, index, dim), index

    return compute


rules_of([("cummax", _cumulative_extreme(True)), ("cummin", _cumulative_extreme(False))])


@rule("aten.diff.default")
def diff(x: Any, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Any:
    if n == 0:
        return x
    parts = [p for p in (prepend, x, append) if p is not None]
    x = jnp.concatenate(parts, axis=dim) if len(parts) > 1 else x
    for _ in range(n):
        after = lax.slice_in_dim(x, min(1, x.shape[dim]), None, axis=dim % x.ndim)
        before = lax.slice_in_dim(x, 0, max(x.shape[dim] - 1, 0), axis=dim % x.ndim)
        x = after ^ before if x.dtype == np.bool_ else after - before
    return x


@rule("aten.trapezoid.x", "aten.trapz.x")
def trapezoid_x(y: Any, x: Any, *, dim: int = -1) -> Any:
    y, x = floats(y, x)
    return jnp.trapezoid(y, x, axis=dim)


@rule("aten.trapezoid.dx", "aten.trapz.dx")
def trapezoid_dx(y: Any, *, dx: Any = 1, dim: int = -1) -> Any:
    (y,) = floats(y)
    return jnp.trapezoid(y, dx=dx, axis=dim)
