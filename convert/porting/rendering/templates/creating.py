"""Arrays made of nothing: constants, ranges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from convert.porting.rendering.operands import Operand, SizeText
from convert.porting.rendering.templates import template
from convert.porting.rendering.templates.writing import (
    dtype_name,
    dtype_text,
    kind,
    number,
    sizes_text,
)
from convert.program.graph import Dtype


def _shape(size: Sequence[Any]) -> str:
    return str(size[0]) if len(size) == 1 else sizes_text(size)


def _full(size: Sequence[Any], value: Any, dtype: str) -> str | None:
    filled = number(value, dtype)
    if filled is None:
        return None
    if value in (0, 1) and not isinstance(value, SizeText):
        name = "ones" if value else "zeros"
        return f"jnp.{name}({_shape(size)}, dtype={dtype_text(dtype)})"
    return f"jnp.full({_shape(size)}, {filled}, dtype={dtype_text(dtype)})"


def _of(value: Any) -> str:
    """The dtype that torch gives a number."""
    kinds = ((bool, "bool"), (int | SizeText, "int64"), (complex, "complex64"))
    return next((name for type_, name in kinds if isinstance(value, type_)), "float32")


@template("aten.full.default")
def full(size: Sequence[Any], fill_value: Any, *, dtype: Dtype | None = None) -> str | None:
    return _full(size, fill_value, dtype_name(dtype, _of(fill_value)))


@template("aten.new_full.default")
def new_full(
    x: Operand, size: Sequence[Any], fill_value: Any, *, dtype: Dtype | None = None
) -> str | None:
    return _full(size, fill_value, dtype_name(dtype, x.dtype))


@template("aten.full_like.default")
def full_like(x: Operand, fill_value: Any, *, dtype: Dtype | None = None) -> str | None:
    name = dtype_name(dtype, x.dtype)
    filled = number(fill_value, name)
    more = "" if name == x.dtype else f", dtype={dtype_text(name)}"
    if filled and fill_value in (0, 1) and not isinstance(fill_value, SizeText):
        return f"jnp.{'ones' if fill_value else 'zeros'}_like({x}{more})"
    return filled and f"jnp.full_like({x}, {filled}{more})"


@template("aten.fill.Scalar")
def fill(x: Operand, value: Any) -> str | None:
    return full_like(x, value)


@template("aten.fill.Tensor")
def fill_tensor(x: Operand, value: Operand) -> str:
    more = "" if value.dtype == x.dtype else f", dtype={dtype_text(x.dtype)}"
    return f"jnp.full_like({x}, {value}{more})"


@template("aten.zero.default")
def zero(x: Operand) -> str:
    return f"jnp.zeros_like({x})"


def _constant(name: str, value: int, overload: str = "default") -> None:
    @template(f"aten.{name}.{overload}")
    def of_size(size: Sequence[Any], *, dtype: Dtype | None = None) -> str | None:
        return _full(size, value, dtype_name(dtype, "float32"))

    @template(f"aten.{name}_like.default")
    def like(x: Operand, *, dtype: Dtype | None = None) -> str | None:
        return full_like(x, value, dtype=dtype)

    @template(f"aten.new_{name}.default")
    def new(x: Operand, size: Sequence[Any], *, dtype: Dtype | None = None) -> str | None:
        return _full(size, value, dtype_name(dtype, x.dtype))


_constant("zeros", 0)
_constant("ones", 1)
_constant("empty", 0, "memory_format")


@template("aten.scalar_tensor.default")
def scalar_tensor(value: Any, *, dtype: Dtype | None = None) -> str | None:
    name = dtype_name(dtype, "float32")
    filled = number(value, name)
    return filled and f"jnp.array({filled}, dtype={dtype_text(name)})"


@template("aten.copy.default")
def copy(x: Operand, src: Operand, non_blocking: bool = False) -> str | None:
    from convert.porting.rendering.templates.casting import to_copy

    text = to_copy(src, dtype=Dtype(x.dtype))
    if text is None or x.shape == src.shape:
        return text
    return f"jnp.broadcast_to({text}, {x}.shape)"


@template("aten.arange.start_step")
def arange(start: Any, end: Any, step: Any = 1, *, dtype: Dtype | None = None) -> str | None:
    values = (start, end, step)
    if not all(isinstance(v, SizeText) or float(v).is_integer() for v in values):
        return None
    whole = all(isinstance(v, int | SizeText) for v in values)
    name = dtype_name(dtype, "int64" if whole else "float32")
    if kind(name) not in (1, 2):
        return None
    texts = [number(v if isinstance(v, SizeText) else int(v), "int64") for v in values]
    if None in texts:
        return None
    shown = texts[1:2] if start == 0 and step == 1 else texts[:2] if step == 1 else texts
    more = "" if name == "int64" else f", dtype={dtype_text(name)}"
    return f"jnp.arange({', '.join(map(str, shown))}{more})"


@template("aten.arange.start")
def arange_start(start: Any, end: Any, *, dtype: Dtype | None = None) -> str | None:
    return arange(start, end, dtype=dtype)


@template("aten.arange.default")
def arange_end(end: Any, *, dtype: Dtype | None = None) -> str | None:
    return arange(0, end, dtype=dtype)


@template("aten.linspace.default")
def linspace(start: Any, end: Any, steps: Any, *, dtype: Dtype | None = None) -> str | None:
    name = dtype_name(dtype, "float32")
    texts = [number(v) for v in (start, end, steps)]
    if kind(name) != 2 or None in texts:
        return None
    return f"jnp.linspace({', '.join(map(str, texts))}, dtype={dtype_text(name)})"


@template("aten.eye.default")
def eye(n: Any, *, dtype: Dtype | None = None) -> str:
    return f"jnp.eye({n}, dtype={dtype_text(dtype_name(dtype, 'float32'))})"


@template("aten.eye.m")
def eye_m(n: Any, m: Any, *, dtype: Dtype | None = None) -> str:
    return f"jnp.eye({n}, {m}, dtype={dtype_text(dtype_name(dtype, 'float32'))})"
