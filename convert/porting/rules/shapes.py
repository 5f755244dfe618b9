"""Shapes, views and pieces. A view is a value: nothing here shares memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from convert.porting.rules import rule, rules_of
from convert.porting.rules.promote import cast, refuse, result_type, together
from convert.porting.rules.reductions import sum_


@rule(
    "aten.view.default",
    "aten._unsafe_view.default",
    "aten.reshape.default",
    "aten.view_copy.default",
    "aten._reshape_copy.default",
)
def view(x: Any, size: Sequence[int]) -> Any:
    size = tuple(size)
    if -1 in size and not x.size:  # NumPy cannot infer it where something is 0
        rest = math.prod(s for s in size if s != -1)
        size = tuple(0 // max(rest, 1) if s == -1 else s for s in size)
    return jnp.reshape(x, size)


@rule("aten.view_as.default", "aten.reshape_as.default")
def view_as(x: Any, other: Any) -> Any:
    return x.reshape(other.shape)


@rule("aten.flatten.using_ints")
def flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    if not x.ndim:
        return x.reshape(1)
    start, end = start_dim % x.ndim, end_dim % x.ndim
    return x.reshape(*x.shape[:start], math.prod(x.shape[start : end + 1]), *x.shape[end + 1 :])


@rule("aten.unflatten.int")
def unflatten(x: Any, dim: int, sizes: Sequence[int]) -> Any:
    dim %= x.ndim
    sizes = list(sizes)
    if -1 in sizes:
        known = -math.prod(sizes)
        sizes[sizes.index(-1)] = x.shape[dim] // max(known, 1)
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


@rule("aten.squeeze.default", "aten.squeeze_copy.default")
def squeeze(x: Any) -> Any:
    return jnp.squeeze(x)


@rule("aten.squeeze.dim", "aten.squeeze.dims", "aten.squeeze_copy.dims")
def squeeze_dims(x: Any, dim: Any) -> Any:
    dims = dim if isinstance(dim, list | tuple) else [dim]
    if not x.ndim:
        return x
    return jnp.squeeze(x, tuple(d % x.ndim for d in dims if x.shape[d] == 1))


@rule("aten.unsqueeze.default", "aten.unsqueeze_copy.default")
def unsqueeze(x: Any, dim: int) -> Any:
    return jnp.expand_dims(x, dim)


@rule("aten.permute.default", "aten.permute_copy.default")
def permute(x: Any, dims: Sequence[int]) -> Any:
    return jnp.transpose(x, [d % x.ndim for d in dims] if x.ndim else None)


@rule("aten.transpose.int", "aten.swapaxes.default", "aten.swapdims.default")
def transpose(x: Any, dim0: int, dim1: int) -> Any:
    return jnp.swapaxes(x, dim0, dim1) if x.ndim else x


@rule("aten.t.default")
def t(x: Any) -> Any:
    return x.T


rules_of(
    {
        "numpy_T": jnp.transpose,
        "mT": lambda x: jnp.swapaxes(x, -1, -2),
        "adjoint": lambda x: jnp.conj(jnp.swapaxes(x, -1, -2)),
        "fliplr": jnp.fliplr,
        "flipud": jnp.flipud,
    }.items()
)


@rule("aten.movedim.intlist")
def movedim(x: Any, source: Sequence[int], destination: Sequence[int]) -> Any:
    return jnp.moveaxis(x, source, destination)


@rule("aten.movedim.int")
def movedim_int(x: Any, source: int, destination: int) -> Any:
    return jnp.moveaxis(x, source, destination) if x.ndim else x


@rule("aten.expand.default", "aten.expand_copy.default")
def expand(x: Any, size: Sequence[int], *, implicit: bool = False) -> Any:
    new = len(size) - x.ndim
    shape = [x.shape[i - new] if s == -1 else s for i, s in enumerate(size)]
    return jnp.broadcast_to(x, shape)


@rule("aten.broadcast_to.default")
def broadcast_to(x: Any, size: Sequence[int]) -> Any:
    return expand(x, size)


@rule("aten.expand_as.default")
def expand_as(x: Any, other: Any) -> Any:
    return jnp.broadcast_to(x, other.shape)


@rule("aten.broadcast_tensors.default")
def broadcast_tensors(tensors: Sequence[Any]) -> Any:
    return tuple(jnp.broadcast_arrays(*tensors))


@rule("aten.repeat.default")
def repeat(x: Any, repeats: Sequence[int]) -> Any:
    x = x.reshape((1,) * (len(repeats) - x.ndim) + x.shape)
    return jnp.tile(x, tuple(repeats))


@rule("aten.tile.default")
def tile(x: Any, dims: Sequence[int]) -> Any:
    return jnp.tile(x, tuple(dims))


@rule("aten.cat.default", "aten.concat.default", "aten.concatenate.default")
def cat(tensors: Sequence[Any], dim: int = 0) -> Any:
    """Empty tensors of one axis count for the dtype alone."""
    dtype = result_type(*tensors)
    kept = [cast(x, dtype) for x in tensors if x.shape != (0,)]
    return jnp.concatenate(kept, axis=dim) if kept else cast(tensors[0], dtype)


@rule("aten.stack.default")
def stack(tensors: Sequence[Any], dim: int = 0) -> Any:
    return jnp.stack(together(*tensors), axis=dim)


@rule("aten.hstack.default")
def hstack(tensors: Sequence[Any]) -> Any:
    return jnp.hstack(together(*tensors))


@rule("aten.vstack.default", "aten.row_stack.default")
def vstack(tensors: Sequence[Any]) -> Any:
    return jnp.vstack(together(*tensors))


@rule("aten.dstack.default")
def dstack(tensors: Sequence[Any]) -> Any:
    return jnp.dstack(together(*tensors))


@rule("aten.column_stack.default")
def column_stack(tensors: Sequence[Any]) -> Any:
    return jnp.column_stack(together(*tensors))


def _pieces(x: Any, sizes: Sequence[int], dim: int) -> tuple[Any, ...]:
    ends = list(itertools.accumulate(sizes))
    axis = dim % x.ndim
    return tuple(lax.slice_in_dim(x, e - s, e, axis=axis) for s, e in zip(sizes, ends, strict=True))


@rule("aten.split.Tensor", "aten.split_copy.Tensor")
def split(x: Any, split_size: int, dim: int = 0) -> Any:
    n = x.shape[dim]
    if not split_size:
        return (x,)
    starts = range(0, max(n, 1), split_size)
    return _pieces(x, [min(split_size, n - s) for s in starts], dim)


@rule("aten.split_with_sizes.default", "aten.split_with_sizes_copy.default", "aten.split.sizes")
def split_with_sizes(x: Any, split_sizes: Sequence[int], dim: int = 0) -> Any:
    return _pieces(x, split_sizes, dim)


@rule("aten.chunk.default", "aten.unsafe_chunk.default")
def chunk(x: Any, chunks: int, dim: int = 0) -> Any:
    n = x.shape[dim]
    if not n:
        return (x,) * chunks
    return split(x, -(-n // chunks), dim)


@rule("aten.tensor_split.sections")
def tensor_split(x: Any, sections: int, dim: int = 0) -> Any:
    return tuple(jnp.array_split(x, sections, axis=dim))


@rule("aten.tensor_split.indices")
def tensor_split_indices(x: Any, indices: Sequence[int], dim: int = 0) -> Any:
    return tuple(jnp.split(x, list(indices), axis=dim))


@rule("aten.unbind.int", "aten.unbind_copy.int")
def unbind(x: Any, dim: int = 0) -> Any:
    return tuple(jnp.moveaxis(x, dim, 0))


def bounds(start: int | None, end: int | None, size: int) -> tuple[int, int]:
    """The first and the last but one of a slice, as torch clamps them."""
    start = 0 if start is None else start + size if start < 0 else start
    end = size if end is None else end + size if end < 0 else end
    start = min(max(start, 0), size)
    return start, min(max(end, start), size)


@rule("aten.slice.Tensor", "aten.slice_copy.Tensor")
def slice_(
    x: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    first, last = bounds(start, end, x.shape[dim])
    return lax.slice_in_dim(x, first, last, step, axis=dim % x.ndim)


@rule("aten.narrow.default", "aten.narrow_copy.default")
def narrow(x: Any, dim: int, start: int, length: int) -> Any:
    start = start + x.shape[dim] if start < 0 else start
    return lax.slice_in_dim(x, start, start + length, axis=dim % x.ndim)


@rule("aten.select.int", "aten.select_copy.int")
def select(x: Any, dim: int, index: int) -> Any:
    return lax.index_in_dim(x, index, dim % x.ndim, keepdims=False)


@rule("aten.flip.default")
def flip(x: Any, dims: Sequence[int]) -> Any:
    return jnp.flip(x, tuple(dims)) if x.ndim else x


@rule("aten.rot90.default")
def rot90(x: Any, k: int = 1, dims: Sequence[int] = (0, 1)) -> Any:
    return jnp.rot90(x, k, (dims[0], dims[1]))


@rule("aten.roll.default")
def roll(x: Any, shifts: Sequence[int], dims: Sequence[int] = ()) -> Any:
    if not dims:
        return jnp.roll(x, shifts[0])
    return jnp.roll(x, tuple(shifts), tuple(dims)) if x.ndim else x


@rule("aten.diagonal.default", "aten.diagonal_copy.default")
def diagonal(x: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    return jnp.diagonal(x, offset, dim1, dim2)


@rule("aten.diag.default")
def diag(x: Any, diagonal: int = 0) -> Any:
    return jnp.diag(x, diagonal)


@rule("aten.diagflat.default")
def diagflat(x: Any, offset: int = 0) -> Any:
    return jnp.diagflat(x, offset)


@rule("aten.diag_embed.default")
def diag_embed(x: Any, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Any:
    n = x.shape[-1] + abs(offset)
    rows = jnp.arange(x.shape[-1]) + max(-offset, 0)
    columns = jnp.arange(x.shape[-1]) + max(offset, 0)
    full = jnp.zeros((*x.shape[:-1], n, n), x.dtype).at[..., rows, columns].set(x)
    return jnp.moveaxis(full, (-2, -1), (dim1, dim2))


@rule("aten.tril.default")
def tril(x: Any, diagonal: int = 0) -> Any:
    return jnp.tril(x, diagonal)


@rule("aten.triu.default")
def triu(x: Any, diagonal: int = 0) -> Any:
    return jnp.triu(x, diagonal)


@rule("aten.unfold.default", "aten.unfold_copy.default")
def unfold(x: Any, dimension: int, size: int, step: int) -> Any:
    if not x.ndim:
        return x.reshape(1)[:size]
    dim = dimension % x.ndim
    count = (x.shape[dim] - size) // step + 1
    index = np.arange(count)[:, None] * step + np.arange(size)
    taken = jnp.take(x, index.reshape(-1), axis=dim)
    taken = taken.reshape(*x.shape[:dim], count, size, *x.shape[dim + 1 :])
    return jnp.moveaxis(taken, dim + 1, -1)


@rule("aten.as_strided.default", "aten.as_strided_copy.default")
def as_strided(
    x: Any, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Any:
    """Reads the memory beneath a tensor, which may be a view's: a value alone does not say."""
    raise refuse("as_strided: write it as reshape, slice, unfold or expand")


@rule("aten.pixel_shuffle.default")
def pixel_shuffle(x: Any, upscale_factor: int) -> Any:
    r = upscale_factor
    *lead, c, h, w = x.shape
    x = x.reshape(*lead, c // r**2, r, r, h, w)
    n = len(lead)
    x = x.transpose(*range(n + 1), n + 3, n + 1, n + 4, n + 2)
    return x.reshape(*lead, c // r**2, h * r, w * r)


@rule("aten.pixel_unshuffle.default")
def pixel_unshuffle(x: Any, downscale_factor: int) -> Any:
    r = downscale_factor
    *lead, c, h, w = x.shape
    x = x.reshape(*lead, c, h // r, r, w // r, r)
    n = len(lead)
    x = x.transpose(*range(n + 1), n + 2, n + 4, n + 1, n + 3)
    return x.reshape(*lead, c * r**2, h // r, w // r)


@rule("aten.channel_shuffle.default", "aten.native_channel_shuffle.default")
def channel_shuffle(x: Any, groups: int) -> Any:
    b, c, *rest = x.shape
    return x.reshape(b, groups, c // groups, *rest).swapaxes(1, 2).reshape(x.shape)


@rule("aten.atleast_1d.default")
def atleast_1d(x: Any) -> Any:
    return jnp.atleast_1d(x)


@rule("aten.atleast_2d.default")
def atleast_2d(x: Any) -> Any:
    return jnp.atleast_2d(x)


@rule("aten.atleast_3d.default")
def atleast_3d(x: Any) -> Any:
    return jnp.atleast_3d(x)


@rule("aten.meshgrid.default")
def meshgrid(tensors: Sequence[Any]) -> Any:
    return tuple(jnp.meshgrid(*(x.reshape(-1) for x in tensors), indexing="ij"))


@rule("aten.meshgrid.indexing")
def meshgrid_indexing(tensors: Sequence[Any], *, indexing: str) -> Any:
    return tuple(jnp.meshgrid(*(x.reshape(-1) for x in tensors), indexing=indexing))


@rule("aten.repeat_interleave.self_int")
def repeat_interleave(
    x: Any, repeats: int, dim: int | None = None, *, output_size: int | None = None
) -> Any:
    return jnp.repeat(x, repeats, axis=dim)


@rule("aten.repeat_interleave.self_Tensor")
def repeat_interleave_tensor(
    x: Any, repeats: Any, dim: int | None = None, *, output_size: int | None = None
) -> Any:
    if repeats.size == 1:
        raise_unless_static(repeats, "repeat_interleave")
        return jnp.repeat(x, int(repeats.reshape(())), axis=dim)
    if output_size is None:
        raise_unless_static(repeats, "repeat_interleave without output_size")
    return jnp.repeat(x, repeats, axis=dim, total_repeat_length=output_size)


def raise_unless_static(value: Any, what: str) -> None:
    """Refuse what needs a value while JAX traces, where only shapes are known."""
    import jax

    if isinstance(value, jax.core.Tracer):
        raise refuse(f"{what}: its shape depends on values")


@rule("aten.sum_to_size.default")
def sum_to_size(x: Any, size: Sequence[int]) -> Any:
    new = x.ndim - len(size)
    axes = [i for i in range(x.ndim) if i < new or (size[i - new] == 1 and x.shape[i] != 1)]
    x = sum_(x, axes, True) if axes or not size else x
    return x.reshape(tuple(size))


@rule("aten.pad_sequence.default")
def pad_sequence(
    sequences: Sequence[Any],
    batch_first: bool = False,
    padding_value: float = 0.0,
    padding_side: str = "right",
) -> Any:
    longest = max(s.shape[0] for s in sequences)

    def padded(s: Any) -> Any:
        more = longest - s.shape[0]
        ends = (0, more) if padding_side == "right" else (more, 0)
        return jnp.pad(s, [ends, *[(0, 0)] * (s.ndim - 1)], constant_values=padding_value)

    return jnp.stack([padded(s) for s in sequences], axis=0 if batch_first else 1)
