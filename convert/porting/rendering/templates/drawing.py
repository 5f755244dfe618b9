"""Random numbers: `self.rngs` is a stream of keys, which the class of the line then holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from convert.porting.rendering.operands import ArrayType, Operand, SizeText
from convert.porting.rendering.templates import template
from convert.porting.rendering.templates.writing import dtype_name, dtype_text, sizes_text
from convert.program.graph import Dtype

KEYS = "self.rngs"


def _drawn(function: str, shape: str, dtype: str) -> str:
    return f"jax.random.{function}({KEYS}(), {shape}, {dtype})"


def _of_size(function: str, size: Sequence[Any], out: ArrayType) -> str | None:
    known = _is_wide(out.dtype)  # torch's default dtype, if none is given
    return _drawn(function, sizes_text(size), dtype_text(out.dtype)) if known else None


def _like(function: str, x: Operand, dtype: Dtype | None = None) -> str | None:
    name = dtype_name(dtype, x.dtype)
    own = f"{x}.dtype" if name == x.dtype else dtype_text(name)
    return _drawn(function, f"{x}.shape", own) if _is_wide(name) else None


def _is_wide(dtype: str) -> bool:
    return dtype in ("float32", "float64")


@template("aten.randn.default")
def randn(size: Sequence[Any], *, dtype: Dtype | None = None, out: ArrayType) -> str | None:
    return _of_size("normal", size, out)


@template("aten.rand.default")
def rand(size: Sequence[Any], *, dtype: Dtype | None = None, out: ArrayType) -> str | None:
    return _of_size("uniform", size, out)


@template("aten.randn_like.default")
def randn_like(x: Operand, *, dtype: Dtype | None = None) -> str | None:
    return _like("normal", x, dtype)


@template("aten.rand_like.default")
def rand_like(x: Operand, *, dtype: Dtype | None = None) -> str | None:
    return _like("uniform", x, dtype)


@template("aten.normal_functional.default")
def normal(x: Operand, mean: float = 0.0, std: float = 1.0) -> str | None:
    drawn = _like("normal", x)
    plain = not isinstance(mean, SizeText) and not isinstance(std, SizeText)
    if drawn is None or not plain or (mean, std) == (0.0, 1.0):
        return drawn if plain else None
    return f"({mean} + {std} * {drawn})" if mean else f"({std} * {drawn})"


@template("aten.uniform.default")
def uniform(x: Operand, low: float = 0.0, high: float = 1.0) -> str | None:
    drawn = _like("uniform", x)
    if drawn is None or isinstance(low, SizeText) or isinstance(high, SizeText):
        return None
    return drawn if (low, high) == (0.0, 1.0) else f"({low} + {high - low} * {drawn})"
