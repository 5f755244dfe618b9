"""Joins, pieces, padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from convert.porting.rendering.operands import Listed, Operand, SizeText
from convert.porting.rendering.templates import template
from convert.porting.rendering.templates.writing import (
    cast,
    common,
    number,
    pairs,
    taken,
    together,
    value_of,
)

# -- joins --------------------------------------------------------------------------------------


@template("aten.cat.default", "aten.concat.default", "aten.concatenate.default")
def cat(tensors: Sequence[Operand], dim: int = 0) -> str | None:
    """Empty tensors of one axis count for the dtype alone."""
    kept = [x for x in tensors if x.shape != (0,)]
    dtype = common(*tensors)
    if not kept or common(*kept) != dtype:
        return None
    if isinstance(tensors, Listed) and len(kept) == len(tensors):
        return _joined("concatenate", tensors, f", axis={dim}")
    if len(kept) == 1:
        return cast(kept[0], dtype)
    return _joined("concatenate", kept, f", axis={dim}")


def _joined(name: str, tensors: Sequence[Operand], more: str = "") -> str | None:
    if isinstance(tensors, Listed) and len({x.dtype for x in tensors}) == 1:
        return f"jnp.{name}({tensors.text}{more})"
    parts = together(*tensors)
    return None if parts is None else f"jnp.{name}([{', '.join(parts)}]{more})"


@template("aten.stack.default")
def stack(tensors: Sequence[Operand], dim: int = 0) -> str | None:
    return _joined("stack", tensors, f", axis={dim}")


def _stacks(name: str) -> Any:
    return lambda tensors: _joined(name, tensors)


for _name in ("hstack", "vstack", "dstack", "column_stack"):
    template(f"aten.{_name}.default")(_stacks(_name))


@template("aten.meshgrid.default", "aten.meshgrid.indexing")
def meshgrid(tensors: Sequence[Operand], *, indexing: str = "ij") -> str | None:
    if any(len(x.shape) != 1 for x in tensors):
        return None
    return f'jnp.meshgrid({", ".join(map(str, tensors))}, indexing="{indexing}")'


# -- pieces -------------------------------------------------------------------------------------


def _pieces(x: Operand, sizes: Sequence[Any], dim: int) -> str | None:
    """Pieces of sizes along an axis: by their number where they are alike, else by their ends."""
    if len(sizes) == 1:
        return f"[{x}]"
    if all(value_of(s) == value_of(sizes[0]) for s in sizes):
        return f"jnp.split({x}, {len(sizes)}, axis={dim})"
    ends = [_total(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    return f"jnp.split({x}, [{', '.join(ends)}], axis={dim})"


def _total(sizes: Sequence[Any]) -> str:
    """The sum of sizes: the number, as far as they are numbers."""
    whole = sum(s for s in sizes if isinstance(s, int))
    named = [str(s) for s in sizes if isinstance(s, SizeText)]
    return " + ".join([*named, *([str(whole)] if whole or not named else [])])


@template("aten.split.Tensor", "aten.split_copy.Tensor")
def split(x: Operand, split_size: Any, dim: int = 0) -> str | None:
    n, size = x.shape[dim], value_of(split_size)
    if not isinstance(n, int) or not isinstance(size, int) or not size or not n:
        return None
    return _pieces(x, [min(size, n - s) for s in range(0, n, size)], dim)


@template("aten.split_with_sizes.default", "aten.split_with_sizes_copy.default", "aten.split.sizes")
def split_with_sizes(x: Operand, split_sizes: Sequence[Any], dim: int = 0) -> str | None:
    return _pieces(x, split_sizes, dim)


@template("aten.chunk.default", "aten.unsafe_chunk.default")
def chunk(x: Operand, chunks: int, dim: int = 0) -> str | None:
    n = x.shape[dim]
    return split(x, -(-n // chunks), dim) if isinstance(n, int) and n else None


@template("aten.tensor_split.sections")
def tensor_split(x: Operand, sections: int, dim: int = 0) -> str:
    return f"jnp.array_split({x}, {sections}, axis={dim})"


@template("aten.tensor_split.indices")
def tensor_split_indices(x: Operand, indices: Any, dim: int = 0) -> str | None:
    if isinstance(indices, Operand):
        return None
    return f"jnp.split({x}, [{', '.join(map(str, indices))}], axis={dim})"


@template("aten.unbind.int", "aten.unbind_copy.int")
def unbind(x: Operand, dim: int = 0) -> str:
    return f"jnp.unstack({x}, axis={dim})"


_LAST = 2**63 - 1


def range_text(start: Any, end: Any, step: Any, size: int | str) -> str:
    """A slice of an axis, as it stands between brackets; ":" where it is the whole axis."""
    first = "" if start is None or value_of(start) == 0 else _bound(start)
    reach = value_of(end)
    whole = end is None or reach == size or (isinstance(reach, int) and reach >= _LAST)
    if isinstance(reach, int) and isinstance(size, int) and reach >= size:
        whole = True
    last = "" if whole else _bound(end)
    return f"{first}:{last}" + ("" if step == 1 else f":{step}")


def _bound(value: Any) -> str:
    return value.text if isinstance(value, SizeText) else str(value)


@template("aten.slice.Tensor", "aten.slice_copy.Tensor")
def slice_(x: Operand, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> str:
    part = range_text(start, end, step, x.shape[dim])
    return x.text if part == ":" else taken(x, dim, part)


@template("aten.narrow.default", "aten.narrow_copy.default")
def narrow(x: Operand, dim: int, start: Any, length: Any) -> str | None:
    first = value_of(start)
    if not isinstance(first, int) or first < 0:
        return None
    end = _total([start, length])
    return slice_(x, dim, first, int(end) if end.isdigit() else SizeText(end, end))


@template("aten.select.int", "aten.select_copy.int")
def select(x: Operand, dim: int, index: Any) -> str:
    return taken(x, dim, _bound(index))


# -- padding ------------------------------------------------------------------------------------

_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _padded(x: Operand, pad: Sequence[Any], mode: str, value: Any = None) -> str | None:
    last_first = list(zip(pad[::2], pad[1::2], strict=True))
    every = [(0, 0)] * (len(x.shape) - len(last_first)) + last_first[::-1]
    if any(not isinstance(p, int) or p < 0 for p in pad):
        return _padded_or_cut(x, every, value) if mode == "constant" else None
    if mode != "constant":
        sized = all(isinstance(s, int) for s, p in zip(x.shape, every, strict=True) if p != (0, 0))
        return f'jnp.pad({x}, {pairs(every)}, mode="{_MODES[mode]}")' if sized else None
    filled = number(value or 0, x.dtype)
    more = "" if not value else f", constant_values={filled}"
    return f"jnp.pad({x}, {pairs(every)}{more})" if filled and x.shape else None


def _padded_or_cut(x: Operand, every: Sequence[tuple[Any, Any]], value: Any) -> str | None:
    """Of numbers that may be negative, which cut off."""
    filled = number(value or 0, x.dtype)
    ends = ", ".join(f"({before}, {after}, 0)" for before, after in every)
    return f"lax.pad({x}, jnp.array({filled}, {x}.dtype), ({ends},))" if filled else None


@template("aten.constant_pad_nd.default")
def constant_pad_nd(x: Operand, pad: Sequence[Any], value: Any = 0) -> str | None:
    return _padded(x, pad, "constant", value)


@template("aten.pad.default")
def pad(x: Operand, pad: Sequence[Any], mode: str = "constant", value: Any = None) -> str | None:
    return _padded(x, pad, mode, value)


for _mode, _names in {
    "reflect": ("reflection_pad1d", "reflection_pad2d", "reflection_pad3d"),
    "replicate": ("replication_pad1d", "replication_pad2d", "replication_pad3d"),
    "circular": ("_pad_circular",),
}.items():
    template(*(f"aten.{n}.default" for n in _names))(
        lambda x, pad, mode=_mode: _padded(x, pad, mode)
    )


@template("aten._pad_enum.default")
def pad_enum(x: Operand, pad: Sequence[Any], mode: int, value: Any = None) -> str | None:
    names = ("reflect", "replicate", "circular", "constant")  # at::padding_mode
    return _padded(x, pad, names[mode], value)
