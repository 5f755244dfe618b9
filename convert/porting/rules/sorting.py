"""Order: sort, topk, medians, buckets, counts."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from convert.porting.rules import rule
from convert.porting.rules.promote import cast, category, promote_types, refuse, result_type
from convert.porting.rules.shapes import raise_unless_static


def _zero_index() -> Any:
    return cast(jnp.zeros((), np.int32), np.int64)


def _order(x: Any, dim: int, descending: bool) -> Any:
    plain = cast(x, np.int32) if x.dtype == np.bool_ else lax.stop_gradient(x)
    return cast(jnp.argsort(plain, axis=dim, stable=True, descending=descending), np.int64)


@rule("aten.sort.default")
def sort(x: Any, dim: int = -1, descending: bool = False) -> tuple[Any, Any]:
    if not x.ndim:
        return x, _zero_index()
    order = _order(x, dim, descending)
    return jnp.take_along_axis(x, order, dim), order


@rule("aten.sort.stable")
def sort_stable(
    x: Any, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Any, Any]:
    return sort(x, dim, descending)


@rule("aten.argsort.default")
def argsort(x: Any, dim: int = -1, descending: bool = False) -> Any:
    return sort(x, dim, descending)[1]


@rule("aten.argsort.stable")
def argsort_stable(x: Any, *, stable: bool, dim: int = -1, descending: bool = False) -> Any:
    return sort(x, dim, descending)[1]


@rule("aten.msort.default")
def msort(x: Any) -> Any:
    return sort(x, 0)[0]


@rule("aten.topk.default")
def topk(
    x: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Any, Any]:
    if not x.ndim:
        return (x, _zero_index()) if k else (x.reshape(1)[:0], _zero_index().reshape(1)[:0])
    order = lax.slice_in_dim(_order(x, dim, largest), 0, k, axis=dim % x.ndim)
    return jnp.take_along_axis(x, order, dim), order


@rule("aten.kthvalue.default")
def kthvalue(x: Any, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Any, Any]:
    if not x.ndim:
        return x, _zero_index()
    order = lax.slice_in_dim(_order(x, dim, False), k - 1, k, axis=dim % x.ndim)
    values = jnp.take_along_axis(x, order, dim)
    return (values, order) if keepdim else (jnp.squeeze(values, dim), jnp.squeeze(order, dim))


def _median(x: Any, dim: int, keepdim: bool, skip_nan: bool) -> tuple[Any, Any]:
    """The lower of the two in the middle; a NaN is the median unless it is skipped."""
    if not x.ndim:
        return x, _zero_index()
    order = _order(x, dim, False)
    ordered = jnp.take_along_axis(x, order, dim)
    count = jnp.sum(~jnp.isnan(x), axis=dim, keepdims=True)
    n = x.shape[dim]
    middle = jnp.maximum(count - 1, 0) // 2
    if not skip_nan:
        middle = jnp.where(count == n, (n - 1) // 2, jnp.minimum(count, n - 1))
    values = jnp.take_along_axis(ordered, middle, dim)
    index = jnp.take_along_axis(order, middle, dim)
    return (values, index) if keepdim else (jnp.squeeze(values, dim), jnp.squeeze(index, dim))


@rule("aten.median.default")
def median(x: Any) -> Any:
    return _median(x.reshape(-1), 0, False, False)[0]


@rule("aten.nanmedian.default")
def nanmedian(x: Any) -> Any:
    return _median(x.reshape(-1), 0, False, True)[0]


@rule("aten.median.dim")
def median_dim(x: Any, dim: int, keepdim: bool = False) -> tuple[Any, Any]:
    return _median(x, dim, keepdim, False)


@rule("aten.nanmedian.dim")
def nanmedian_dim(x: Any, dim: int, keepdim: bool = False) -> tuple[Any, Any]:
    return _median(x, dim, keepdim, True)


def _quantile(
    x: Any, q: Any, dim: int | None, keepdim: bool, interpolation: str, skip_nan: bool
) -> Any:
    function = jnp.nanquantile if skip_nan else jnp.quantile
    q = cast(q, x.dtype)
    if not x.ndim:
        x, dim, keepdim = x.reshape(1), 0, False
    return function(x, q, axis=dim, keepdims=keepdim, method=interpolation)


@rule("aten.quantile.default", "aten.quantile.scalar")
def quantile(
    x: Any,
    q: Any,
    dim: int | None = None,
    keepdim: bool = False,
    *,
    interpolation: str = "linear",
) -> Any:
    return _quantile(x, q, dim, keepdim, interpolation, False)


@rule("aten.nanquantile.default", "aten.nanquantile.scalar")
def nanquantile(
    x: Any,
    q: Any,
    dim: int | None = None,
    keepdim: bool = False,
    *,
    interpolation: str = "linear",
) -> Any:
    return _quantile(x, q, dim, keepdim, interpolation, True)


def _bucket(boundaries: Any, values: Any, right: bool, out_int32: bool) -> Any:
    dtype = promote_types(boundaries.dtype, result_type(values))
    ordered, values = cast(boundaries, dtype), cast(values, dtype)
    side = "right" if right else "left"
    if ordered.ndim == 1:
        found = jnp.searchsorted(ordered, values, side=side)
    else:
        before = ordered[..., None, :] <= values[..., :, None]
        if not right:
            before = ordered[..., None, :] < values[..., :, None]
        found = jnp.sum(before, axis=-1)
    return cast(found, np.int32 if out_int32 else np.int64)


@rule("aten.searchsorted.Tensor", "aten.searchsorted.Scalar")
def searchsorted(
    ordered: Any,
    values: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Any = None,
) -> Any:
    if sorter is not None:
        ordered = jnp.take_along_axis(ordered, sorter, -1)
    return _bucket(ordered, values, right or side == "right", out_int32)


@rule("aten.bucketize.Tensor", "aten.bucketize.Scalar")
def bucketize(values: Any, boundaries: Any, *, out_int32: bool = False, right: bool = False) -> Any:
    return _bucket(boundaries, values, right, out_int32)


@rule("aten.bincount.default")
def bincount(x: Any, weights: Any = None, minlength: int = 0) -> Any:
    raise_unless_static(x, "bincount")
    length = max(int(np.asarray(x).max(initial=-1)) + 1, minlength)
    if weights is None:
        return cast(jnp.bincount(x, length=length), np.int64)
    dtype = weights.dtype if weights.dtype == np.float32 else np.float64
    return cast(jnp.bincount(x, cast(weights, dtype), length=length), dtype)


@rule("aten.histc.default")
def histc(x: Any, bins: int = 100, min: Any = 0, max: Any = 0) -> Any:
    low, high = cast(min, x.dtype), cast(max, x.dtype)
    if min == max and x.size:
        low, high = jnp.min(x), jnp.max(x)
        low, high = jnp.where(low == high, low - 1, low), jnp.where(low == high, high + 1, high)
    flat = x.reshape(-1)
    bin_ = cast(jnp.floor((flat - low) * bins / (high - low)), np.int32)
    bin_ = jnp.where(flat == high, bins - 1, bin_)
    inside = (flat >= low) & (flat <= high)
    counts = jnp.zeros(bins, np.float32 if category(x.dtype) < 2 else x.dtype)
    return cast(counts.at[jnp.where(inside, bin_, bins)].add(1, mode="drop"), x.dtype)


@rule("aten.isin.Tensor_Tensor", "aten.isin.Tensor_Scalar", "aten.isin.Scalar_Tensor")
def isin(a: Any, b: Any, *, assume_unique: bool = False, invert: bool = False) -> Any:
    a, b = jnp.asarray(a), jnp.asarray(b).reshape(-1)
    found = jnp.any(a[..., None] == b, axis=-1)
    return ~found if invert else found


@rule("aten._unique2.default", "aten.unique_dim.default", "aten.unique_consecutive.default")
def unique(*_: Any, **__: Any) -> Any:
    raise refuse("unique: its shape depends on values")


@rule("aten.mode.default")
def mode(x: Any, dim: int = -1, keepdim: bool = False) -> Any:
    raise refuse("mode: which of several places it names is not stated by torch")
