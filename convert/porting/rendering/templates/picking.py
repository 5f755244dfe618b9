"""Indexing: what is taken by an index, and what is written at one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from convert.porting.rendering.operands import Operand
from convert.porting.rendering.templates import template
from convert.porting.rendering.templates.joining import range_text
from convert.porting.rendering.templates.writing import at, cast, in_dtype, kind


def _subscript(indices: Sequence[Operand | None]) -> str | None:
    """torch's list of indices between brackets. A mask's places depend on values."""
    if any(i is not None and i.dtype in ("bool", "uint8") for i in indices):
        return None
    return ", ".join(":" if i is None else i.text for i in indices)


@template("aten.index.Tensor", "aten._unsafe_index.Tensor")
def index(x: Operand, indices: Sequence[Operand | None]) -> str | None:
    places = _subscript(indices)
    return places and f"{x}[{places}]"


@template("aten.index_put.default", "aten._unsafe_index_put.default")
def index_put(
    x: Operand, indices: Sequence[Operand | None], values: Operand, accumulate: bool = False
) -> str | None:
    first = indices[0]
    if len(indices) == 1 and first is not None and first.dtype == "bool":
        whole = len(first.shape) == len(x.shape) and values.shape in ((), (1,)) and not accumulate
        return f"jnp.where({first}, {cast(values, x.dtype)}, {x})" if whole and x.shape else None
    places = _subscript(indices)
    how = ("max" if x.dtype == "bool" else "add") if accumulate else "set"
    return places and f"{x}.at[{places}].{how}({_bare(values, x.dtype)})"


def _bare(x: Operand, dtype: str) -> str:
    """An array as a whole argument, in the dtype."""
    return x.text if x.dtype == dtype else cast(x, dtype)


@template("aten.index_select.default")
def index_select(x: Operand, dim: int, index: Operand) -> str | None:
    plain = x.shape and len(index.shape) == 1
    return f"jnp.take({x}, {index}, axis={dim})" if plain else None


@template("aten.gather.default")
def gather(x: Operand, dim: int, index: Operand, *, sparse_grad: bool = False) -> str | None:
    if not _alike(x, index, dim) or 0 in index.shape:
        return None
    return f"jnp.take_along_axis({x}, {index}, axis={dim})"


def _alike(x: Operand, index: Operand, dim: int) -> bool:
    """Whether an index has the array's sizes on all axes but one."""
    n = len(x.shape)
    if not n or len(index.shape) != n:
        return False
    return all(
        a == b for i, (a, b) in enumerate(zip(x.shape, index.shape, strict=True)) if i != dim % n
    )


@template("aten.take_along_dim.default")
def take_along_dim(x: Operand, indices: Operand, dim: int | None = None) -> str | None:
    return None if dim is None else gather(x, dim, indices)


@template("aten.embedding.default")
def embedding(
    weight: Operand,
    indices: Operand,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> str | None:
    """A row that pads has no gradient: the rule says how."""
    return None if padding_idx >= 0 or scale_grad_by_freq else f"{weight}[{indices.text}]"


@template("aten.one_hot.default")
def one_hot(x: Operand, num_classes: Any = -1) -> str | None:
    if not isinstance(num_classes, int) or num_classes < 0:
        return None
    return f"jax.nn.one_hot({x}, {num_classes}, dtype=int)"


# -- written ------------------------------------------------------------------------------------


@template("aten.scatter.value", "aten.scatter.src")
def scatter(x: Operand, dim: int, index: Operand, src: Any) -> str | None:
    if not _alike(x, index, dim) or 0 in index.shape:
        return None
    if isinstance(src, Operand) and src.shape and src.shape != index.shape:
        return None
    value = in_dtype(src, x.dtype)
    return value and f"jnp.put_along_axis({x}, {index}, {value}, axis={dim}, inplace=False)"


@template("aten.index_add.default")
def index_add(
    x: Operand, dim: int, index: Operand, source: Operand, *, alpha: Any = 1
) -> str | None:
    if kind(x) == 0 or alpha != 1:
        return None
    return _along(x, dim, index, source, "add")


@template("aten.index_copy.default")
def index_copy(x: Operand, dim: int, index: Operand, source: Operand) -> str | None:
    return _along(x, dim, index, source, "set")


def _along(x: Operand, dim: int, index: Operand, source: Operand, how: str) -> str | None:
    if not x.shape or len(index.shape) != 1 or not source.shape:
        return None
    place = at(dim, len(x.shape), index.text)
    return f"{x}.at[{place}].{how}({_bare(source, x.dtype)})"


@template("aten.index_fill.int_Scalar", "aten.index_fill.int_Tensor")
def index_fill(x: Operand, dim: int, index: Operand, value: Any) -> str | None:
    filled = in_dtype(value, x.dtype)
    if not x.shape or len(index.shape) != 1 or filled is None:
        return None
    return f"{x}.at[{at(dim, len(x.shape), index.text)}].set({filled})"


@template("aten.select_scatter.default")
def select_scatter(x: Operand, src: Operand, dim: int, index: Any) -> str:
    place = at(dim, len(x.shape), getattr(index, "text", str(index)))
    return f"{x}.at[{place}].set({_bare(src, x.dtype)})"


@template("aten.slice_scatter.default")
def slice_scatter(
    x: Operand, src: Operand, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> str:
    part = range_text(start, end, step, x.shape[dim])
    if part == ":" and x.shape == src.shape:
        return _bare(src, x.dtype)
    return f"{x}.at[{at(dim, len(x.shape), part)}].set({_bare(src, x.dtype)})"
