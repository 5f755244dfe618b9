"""Shapes, axes, pieces, joins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from convert.porting.rendering.operands import ArrayType, Operand, SizeText
from convert.porting.rendering.templates import template
from convert.porting.rendering.templates.writing import (
    at,
    axis_text,
    known,
    same_shape,
    sizes_text,
    value_of,
)

# -- shapes -------------------------------------------------------------------------------------


# A size that reads well: a number, a name, one axis of something.
_NAMED = re.compile(r"[\w.]+(\.shape\[-?\d+\])?")


def _reshaped(x: Operand, sizes: Sequence[Any]) -> str:
    """One size that would have to be computed is left to JAX."""
    computed = [i for i, s in enumerate(sizes) if not _NAMED.fullmatch(_bare_text(s))]
    if len(computed) == 1 and not {0, -1} & {value_of(s) for s in sizes}:
        sizes = [-1 if i == computed[0] else s for i, s in enumerate(sizes)]
    return f"{x}.reshape({', '.join(map(str, sizes)) or '()'})"


def _bare_text(size: Any) -> str:
    return size.text if isinstance(size, SizeText) else str(abs(size))


@template(
    "aten.view.default",
    "aten._unsafe_view.default",
    "aten.reshape.default",
    "aten.view_copy.default",
    "aten._reshape_copy.default",
)
def view(x: Operand, size: Sequence[Any]) -> str | None:
    if -1 in [value_of(s) for s in size] and 0 in x.shape:
        return None
    return x.text if same_shape(x.shape, size) else _reshaped(x, size)


@template("aten.view_as.default", "aten.reshape_as.default")
def view_as(x: Operand, other: Operand) -> str:
    return f"{x}.reshape({other}.shape)"


@template("aten.flatten.using_ints")
def flatten(x: Operand, start_dim: int = 0, end_dim: int = -1) -> str | None:
    n = len(x.shape)
    if not n or 0 in x.shape:
        return None if n else f"{x}.reshape(1)"
    start, end = start_dim % n, end_dim % n
    if start == end:
        return x.text
    return f"{x}.reshape({', '.join([*_lead(x, start), '-1', *_rest(x, end + 1)])})"


@template("aten.unflatten.int")
def unflatten(x: Operand, dim: int, sizes: Sequence[Any]) -> str | None:
    n = len(x.shape)
    dim %= n
    if 0 in x.shape:
        return None
    return f"{x}.reshape({', '.join([*_lead(x, dim), *map(str, sizes), *_rest(x, dim + 1)])})"


def _lead(x: Operand, end: int) -> list[str]:
    """The sizes of the axes before this one."""
    return [f"{x}.shape[0]"] if end == 1 else [f"*{x}.shape[:{end}]"] if end else []


def _rest(x: Operand, start: int) -> list[str]:
    """The sizes of the axes from this one on."""
    left = len(x.shape) - start
    return [f"{x}.shape[-1]"] if left == 1 else [f"*{x}.shape[{start}:]"] if left else []


def _squeezed(x: Operand, dims: Sequence[int]) -> str:
    ones = [d for d in dims if x.shape and x.shape[d] == 1]
    return f"{x}.squeeze({axis_text(ones)})" if ones else x.text


@template("aten.squeeze.default", "aten.squeeze_copy.default")
def squeeze(x: Operand) -> str:
    if 1 in x.shape and known(x.shape):
        return f"{x}.squeeze()"
    return _squeezed(x, range(len(x.shape)))


@template("aten.squeeze.dim", "aten.squeeze.dims", "aten.squeeze_copy.dims")
def squeeze_dims(x: Operand, dim: Any, *, out: ArrayType | None) -> str:
    dims = list(dim) if isinstance(dim, list | tuple) else [dim]
    if (
        x.shape and out is not None and len(out.shape) == len(x.shape) - len(dims)
    ):  # a size may be an expression
        return f"{x}.squeeze({axis_text(dims)})"
    return _squeezed(x, dims)


@template("aten.unsqueeze.default", "aten.unsqueeze_copy.default")
def unsqueeze(x: Operand, dim: int) -> str:
    dim %= len(x.shape) + 1
    if dim == 2 < len(x.shape):
        return f"{x}[:, :, None]"
    return f"{x}[{at(dim, len(x.shape) + 1, 'None')}]"


@template("aten.permute.default", "aten.permute_copy.default")
def permute(x: Operand, dims: Sequence[int]) -> str:
    if [d % len(dims) for d in dims] == list(range(len(dims))):
        return x.text
    return f"{x}.transpose({', '.join(map(str, dims))})"


@template("aten.transpose.int", "aten.swapaxes.default", "aten.swapdims.default")
def transpose(x: Operand, dim0: int, dim1: int) -> str:
    n = len(x.shape)
    if not n or dim0 % n == dim1 % n:
        return x.text
    return f"{x}.T" if n == 2 else f"{x}.swapaxes({dim0}, {dim1})"


@template("aten.t.default", "aten.numpy_T.default")
def t(x: Operand) -> str:
    return f"{x}.T" if len(x.shape) > 1 else x.text


@template("aten.mT.default")
def matrix_transpose(x: Operand) -> str:
    return f"{x}.mT"


@template("aten.movedim.int", "aten.movedim.intlist")
def movedim(x: Operand, source: Any, destination: Any) -> str | None:
    return f"jnp.moveaxis({x}, {axis_text(source)}, {axis_text(destination)})" if x.shape else None


@template("aten.expand.default", "aten.expand_copy.default", "aten.broadcast_to.default")
def expand(x: Operand, size: Sequence[Any], *, implicit: bool = False) -> str:
    new = len(size) - len(x.shape)
    shape: list[Any] = []
    for i, s in enumerate(size):
        if value_of(s) != -1:
            shape.append(s)
        else:
            own = x.shape[i - new]
            shape.append(own if isinstance(own, int) else SizeText(f"{x}.shape[{i - new}]", own))
    return x.text if same_shape(x.shape, shape) else f"jnp.broadcast_to({x}, {sizes_text(shape)})"


@template("aten.expand_as.default")
def expand_as(x: Operand, other: Operand) -> str:
    return x.text if same_shape(x.shape, other.shape) else f"jnp.broadcast_to({x}, {other}.shape)"


@template("aten.broadcast_tensors.default")
def broadcast_tensors(tensors: Sequence[Operand]) -> str:
    return f"jnp.broadcast_arrays({', '.join(map(str, tensors))})"


@template("aten.repeat.default")
def repeat(x: Operand, repeats: Sequence[Any]) -> str:
    if len(repeats) == len(x.shape) and all(value_of(r) == 1 for r in repeats):
        return x.text
    return f"jnp.tile({x}, {sizes_text(repeats)})"


@template("aten.tile.default")
def tile(x: Operand, dims: Sequence[Any]) -> str:
    return f"jnp.tile({x}, {sizes_text(dims)})"


@template("aten.repeat_interleave.self_int")
def repeat_interleave(
    x: Operand, repeats: Any, dim: int | None = None, *, output_size: Any = None
) -> str:
    return f"jnp.repeat({x}, {repeats}{'' if dim is None else f', axis={dim}'})"


# -- turned -------------------------------------------------------------------------------------


@template("aten.flip.default")
def flip(x: Operand, dims: Sequence[int]) -> str:
    return f"jnp.flip({x}, axis={axis_text(dims)})" if x.shape and dims else x.text


@template("aten.fliplr.default")
def fliplr(x: Operand) -> str:
    return f"jnp.fliplr({x})"


@template("aten.flipud.default")
def flipud(x: Operand) -> str:
    return f"jnp.flipud({x})"


@template("aten.roll.default")
def roll(x: Operand, shifts: Sequence[Any], dims: Sequence[int] = ()) -> str:
    if not x.shape:
        return x.text
    if not dims:
        return f"jnp.roll({x}, {axis_text(shifts)})"
    return f"jnp.roll({x}, {axis_text(shifts)}, axis={axis_text(dims)})"


@template("aten.diagonal.default", "aten.diagonal_copy.default")
def diagonal(x: Operand, offset: int = 0, dim1: int = 0, dim2: int = 1) -> str:
    more = f", offset={offset}" if offset else ""
    more += f", axis1={dim1}, axis2={dim2}" if (dim1, dim2) != (0, 1) else ""
    return f"jnp.diagonal({x}{more})"


def _triangle(name: str) -> Any:
    def write(x: Operand, diagonal: int = 0) -> str:
        return f"jnp.{name}({x}{f', {diagonal}' if diagonal else ''})"

    return write


for _name in ("tril", "triu", "diag"):
    template(f"aten.{_name}.default")(_triangle(_name))
