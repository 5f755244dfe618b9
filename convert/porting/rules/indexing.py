"""Indexing: taking, putting, scattering, masking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from convert.porting.rules import rule
from convert.porting.rules.promote import cast, category, extremes, opmath, refuse
from convert.porting.rules.shapes import bounds, raise_unless_static


def _is_mask(index: Any) -> bool:
    return index is not None and index.dtype in (np.dtype(bool), np.dtype(np.uint8))


def _places(indices: Sequence[Any]) -> tuple[Any, ...]:
    """torch's list of indices as NumPy's: masks become the places that they pick."""
    places: list[Any] = []
    for index in indices:
        if _is_mask(index):
            raise_unless_static(index, "an index by a mask")
            places += list(np.nonzero(np.asarray(index)))
        else:
            places.append(slice(None) if index is None else index)
    return tuple(places)


@rule("aten.index.Tensor", "aten._unsafe_index.Tensor")
def index(x: Any, indices: Sequence[Any]) -> Any:
    return x[_places(indices)]


@rule("aten.index_put.default", "aten._unsafe_index_put.default")
def index_put(x: Any, indices: Sequence[Any], values: Any, accumulate: bool = False) -> Any:
    values = cast(values, x.dtype)
    masks = [i for i in indices if _is_mask(i)]
    if len(masks) == 1 and isinstance(masks[0], jax.core.Tracer):
        return _put_by_mask(x, indices, values, accumulate)
    at = x.at[_places(indices)]
    return _added(at, values) if accumulate else at.set(values)


def _added(at: Any, values: Any) -> Any:
    """Values added to the places of an array; of booleans whether any is true."""
    return at.max(values) if values.dtype == np.bool_ else at.add(values)


def _put_by_mask(x: Any, indices: Sequence[Any], values: Any, accumulate: bool) -> Any:
    """A mask whose values are not known, where one value goes to all its places."""
    position = next(i for i, index in enumerate(indices) if index is not None)
    mask = indices[position]
    rest = x.ndim - position - mask.ndim
    if sum(i is not None for i in indices) > 1 or (position and values.size > 1):
        raise refuse("index_put by a mask and other indices")
    if values.ndim > rest:
        if values.shape[0] != 1:
            raise refuse("index_put by a mask: how many values it takes depends on values")
        values = values[0]
    mask = cast(mask, np.bool_).reshape(mask.shape + (1,) * rest)
    return jnp.where(mask, x + values if accumulate else values, x)


@rule("aten.index_select.default")
def index_select(x: Any, dim: int, index: Any) -> Any:
    if not x.ndim:
        return x if not index.ndim else jnp.broadcast_to(x, ())
    return jnp.take(x, index.reshape(-1), axis=dim)


@rule("aten.take.default")
def take(x: Any, index: Any) -> Any:
    return x.reshape(-1)[index]


@rule("aten.take_along_dim.default")
def take_along_dim(x: Any, indices: Any, dim: int | None = None) -> Any:
    if dim is None:
        return x.reshape(-1)[indices.reshape(-1)]
    dim %= x.ndim
    both = zip(x.shape, indices.shape, strict=True)
    shape = [b if a == 1 else a for a, b in both]
    of_x = [x.shape[dim] if i == dim else s for i, s in enumerate(shape)]
    of_index = [indices.shape[dim] if i == dim else s for i, s in enumerate(shape)]
    x, indices = jnp.broadcast_to(x, of_x), jnp.broadcast_to(indices, of_index)
    return jnp.take_along_axis(x, indices, dim)


@rule("aten.gather.default")
def gather(x: Any, dim: int, index: Any, *, sparse_grad: bool = False) -> Any:
    if not x.ndim or not index.ndim:
        return jnp.broadcast_to(x.reshape(-1)[0], index.shape)
    if not index.size:
        return jnp.zeros(index.shape, x.dtype)
    dim %= x.ndim
    limits = [x.shape[i] if i == dim else n for i, n in enumerate(index.shape)]
    return jnp.take_along_axis(lax.slice(x, [0] * x.ndim, limits), index, dim)


def _scattered(x: Any, dim: int, index: Any) -> Any:
    """x at the places that scatter writes to."""
    dim %= x.ndim
    grid = jnp.indices(index.shape, sparse=True)
    return x.at[tuple(index if i == dim else g for i, g in enumerate(grid))]


def _source(source: Any, index: Any, dtype: Any) -> Any:
    if not getattr(source, "ndim", 0):
        return cast(source, dtype)
    return cast(lax.slice(source, [0] * source.ndim, index.shape), dtype)


def _scatter(x: Any, dim: int, index: Any, source: Any, reduce: str | None = None) -> Any:
    if not x.ndim:
        found = _scatter(x.reshape(1), 0, index.reshape(-1), jnp.reshape(source, -1), reduce)
        return found.reshape(())
    if not index.size:
        return x
    source = _source(source, index, x.dtype)
    if reduce and x.dtype == np.bool_:
        return _scatter(cast(x, np.int32), dim, index, cast(source, np.int32), reduce) != 0
    at = _scattered(x, dim, index)
    writes = {None: at.set, "add": at.add, "multiply": at.multiply}
    return writes[reduce](source)


@rule("aten.scatter.src", "aten.scatter.value")
def scatter(x: Any, dim: int, index: Any, src: Any) -> Any:
    return _scatter(x, dim, index, src)


@rule("aten.scatter.reduce", "aten.scatter.value_reduce")
def scatter_reduced(x: Any, dim: int, index: Any, src: Any, *, reduce: str) -> Any:
    return _scatter(x, dim, index, src, reduce)


@rule("aten.scatter_add.default")
def scatter_add(x: Any, dim: int, index: Any, src: Any) -> Any:
    return _scatter(x, dim, index, src, "add")


def _reduce_at(at: Any, source: Any, how: str) -> Any:
    writes = {
        "sum": at.add,
        "mean": at.add,
        "prod": at.multiply,
        "amax": at.max,
        "amin": at.min,
    }
    return writes[how](source)


_NEUTRAL = {"sum": 0, "mean": 0, "prod": 1}


def _neutral(how: str, dtype: Any) -> Any:
    if how in _NEUTRAL:
        return cast(_NEUTRAL[how], dtype)
    return jnp.asarray(extremes(dtype)[how == "amin"])


def _reduced_into(x: Any, write: Any, source: Any, how: str, include_self: bool) -> Any:
    """x with source reduced into the places that `write(array)` names."""
    if x.dtype == np.bool_:
        plain = cast(x, np.int32), cast(source, np.int32)
        return _reduced_into(plain[0], write, plain[1], how, include_self) != 0
    wider = opmath(x.dtype)
    ones = jnp.ones(np.shape(source), wider)
    hits = write(jnp.zeros(x.shape, wider)).add(ones)
    hit = hits > 0
    start = cast(x, wider)
    if not include_self:
        start = jnp.where(hit, _neutral(how, wider), start)
    result = _reduce_at(write(start), cast(source, wider), how)
    if how == "mean":
        count = jnp.where(hit, hits + (1 if include_self else 0), 1)
        mean = result / count if category(x.dtype) >= 2 else jnp.floor_divide(result, count)
        result = mean
    return cast(result, x.dtype)


@rule("aten.scatter_reduce.two")
def scatter_reduce(
    x: Any, dim: int, index: Any, src: Any, reduce: str, *, include_self: bool = True
) -> Any:
    if not x.ndim:
        one = scatter_reduce(
            x.reshape(1), 0, index.reshape(-1), src.reshape(-1), reduce, include_self=include_self
        )
        return one.reshape(())
    if not index.size:
        return x
    source = _source(src, index, x.dtype)
    return _reduced_into(x, lambda a: _scattered(a, dim, index), source, reduce, include_self)


def _along(dim: int, index: Any, ndim: int) -> tuple[Any, ...]:
    return (slice(None),) * (dim % ndim) + (index,) if ndim else (Ellipsis,)


@rule("aten.index_reduce.default")
def index_reduce(
    x: Any, dim: int, index: Any, source: Any, reduce: str, *, include_self: bool = True
) -> Any:
    if not x.ndim:
        raise refuse("index_reduce of a tensor without axes")
    places = _along(dim, index.reshape(-1), x.ndim)
    return _reduced_into(x, lambda a: a.at[places], source, reduce, include_self)


@rule("aten.index_add.default")
def index_add(x: Any, dim: int, index: Any, source: Any, *, alpha: Any = 1) -> Any:
    source = cast(source, x.dtype) * cast(alpha, x.dtype)
    if not x.ndim:
        return x + jnp.sum(source).astype(x.dtype)
    if not source.ndim:
        source = source.reshape((1,) * x.ndim)
    return _added(x.at[_along(dim, index.reshape(-1), x.ndim)], source)


@rule("aten.index_copy.default")
def index_copy(x: Any, dim: int, index: Any, source: Any) -> Any:
    if not x.ndim:
        return cast(source, x.dtype).reshape(())
    if not source.ndim:
        source = source.reshape((1,) * x.ndim)
    return x.at[_along(dim, index.reshape(-1), x.ndim)].set(cast(source, x.dtype))


@rule("aten.index_fill.int_Scalar", "aten.index_fill.int_Tensor")
def index_fill(x: Any, dim: int, index: Any, value: Any) -> Any:
    if not x.ndim:
        return cast(value, x.dtype) if index.size else x
    return x.at[_along(dim, index.reshape(-1), x.ndim)].set(cast(value, x.dtype))


@rule("aten.put.default")
def put(x: Any, index: Any, source: Any, accumulate: bool = False) -> Any:
    at = x.reshape(-1).at[index.reshape(-1)]
    source = source.reshape(-1)
    return (_added(at, source) if accumulate else at.set(source)).reshape(x.shape)


# -- pieces written back ------------------------------------------------------------------------


@rule("aten.select_scatter.default")
def select_scatter(x: Any, src: Any, dim: int, index: int) -> Any:
    return x.at[_along(dim, index, x.ndim)].set(cast(src, x.dtype))


@rule("aten.slice_scatter.default")
def slice_scatter(
    x: Any,
    src: Any,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Any:
    first, last = bounds(start, end, x.shape[dim])
    return x.at[_along(dim, slice(first, last, step), x.ndim)].set(cast(src, x.dtype))


@rule("aten.diagonal_scatter.default")
def diagonal_scatter(x: Any, src: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    turned = jnp.moveaxis(x, (dim1, dim2), (-2, -1))
    n = src.shape[-1]
    rows, columns = jnp.arange(n) + max(-offset, 0), jnp.arange(n) + max(offset, 0)
    written = turned.at[..., rows, columns].set(cast(src, x.dtype))
    return jnp.moveaxis(written, (-2, -1), (dim1, dim2))


# -- masks --------------------------------------------------------------------------------------


@rule("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def masked_fill(x: Any, mask: Any, value: Any) -> Any:
    return jnp.where(cast(mask, np.bool_), cast(value, x.dtype), x)


@rule("aten.masked_scatter.default")
def masked_scatter(x: Any, mask: Any, source: Any) -> Any:
    shape = jnp.broadcast_shapes(x.shape, mask.shape)
    x, mask = jnp.broadcast_to(x, shape), jnp.broadcast_to(cast(mask, np.bool_), shape)
    if not source.size:
        return x
    order = jnp.cumsum(mask.reshape(-1)) - 1
    taken = source.reshape(-1)[jnp.clip(order, 0, source.size - 1)]
    return jnp.where(mask, taken.reshape(shape), x)


@rule("aten.masked_select.default")
def masked_select(x: Any, mask: Any) -> Any:
    raise_unless_static(mask, "masked_select")
    x, mask = jnp.broadcast_arrays(jnp.atleast_1d(x), mask)
    return x[np.nonzero(np.asarray(mask))]


@rule("aten.nonzero.default", "aten.argwhere.default")
def nonzero(x: Any) -> Any:
    raise_unless_static(x, "nonzero")
    return cast(np.argwhere(np.asarray(x)), np.int64)


@rule("aten.nonzero_numpy.default")
def nonzero_numpy(x: Any) -> Any:
    return tuple(jnp.moveaxis(nonzero(jnp.atleast_1d(x)), 1, 0))


# -- embeddings ---------------------------------------------------------------------------------


@rule("aten.embedding.default")
def embedding(
    weight: Any,
    indices: Any,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """The row of `padding_idx` has no gradient."""
    if scale_grad_by_freq:
        raise refuse("embedding with scale_grad_by_freq=True")
    rows = weight[indices]
    if padding_idx < 0:
        return rows
    return jnp.where((indices == padding_idx)[..., None], lax.stop_gradient(rows), rows)


@rule("aten.embedding_bag.padding_idx", "aten._embedding_bag.default")
def embedding_bag(
    weight: Any,
    indices: Any,
    offsets: Any,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    raise refuse("embedding_bag: pad the bags and sum an embedding over them")


@rule("aten.one_hot.default")
def one_hot(x: Any, num_classes: int = -1) -> Any:
    if num_classes < 0:
        raise_unless_static(x, "one_hot without num_classes")
        num_classes = int(np.asarray(x).max()) + 1
    return cast(x[..., None] == jnp.arange(num_classes), np.int64)
