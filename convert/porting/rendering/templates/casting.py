"""Changes of dtype, and what changes nothing."""

from __future__ import annotations

from typing import Any

from convert.porting.rendering.operands import Operand
from convert.porting.rendering.templates import template
from convert.porting.rendering.templates.writing import cast, kind
from convert.porting.rules.elementwise import COPIES
from convert.program.graph import Dtype


def _to(x: Operand, dtype: str | None) -> str | None:
    """JAX saturates where torch wraps a float into uint8, and warns at an imaginary part."""
    if dtype is None or dtype == x.dtype:
        return x.text
    if dtype == "complex32":  # which JAX has not
        return None
    if (kind(x) == 2 and dtype == "uint8") or (kind(x) == 3 and kind(dtype) != 3):
        return None
    return cast(x, dtype)


@template("aten._to_copy.default")
def to_copy(x: Operand, *, dtype: Dtype | None = None) -> str | None:
    return _to(x, None if dtype is None else dtype.name)


@template("aten.to.dtype", "aten.to.dtype_layout", "aten.to.device")
def to_dtype(
    x: Operand, *args: Any, dtype: Dtype | None = None, copy: bool = False, **_: Any
) -> str | None:
    dtypes = [a for a in (*args, dtype) if isinstance(a, Dtype)]
    return _to(x, dtypes[0].name if dtypes else None)


@template("prims.convert_element_type.default")
def convert_element_type(x: Operand, dtype: Dtype) -> str | None:
    return _to(x, dtype.name)


@template("aten.type_as.default", "aten.to.other")
def type_as(x: Operand, other: Operand, *_: Any, **__: Any) -> str | None:
    if x.dtype == other.dtype:
        return x.text
    return _to(x, other.dtype) and f"{x}.astype({other}.dtype)"


@template(*COPIES, "aten.positive.default")
def identity(x: Operand, **_: Any) -> str:
    return x.text


@template("aten.detach.default", "aten.detach_copy.default", "aten.data.default")
def detach(x: Operand) -> str:
    return f"lax.stop_gradient({x})"


@template("aten.dropout.default", "aten.feature_dropout.default", "aten.alpha_dropout.default")
def dropout(x: Operand, p: float, train: bool) -> str | None:
    return None if train and p else x.text
