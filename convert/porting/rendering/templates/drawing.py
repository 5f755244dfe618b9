"""Random numbers: `self.rngs` is a stream of keys, which the class of the line then holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from convert.porting.rendering.operands import Operand, SizeText
from convert.porting.rendering.templates import template
from convert.porting.rendering.templates.writing import dtype_name, dtype_text, sizes_text
from convert.program.graph import Dtype

KEYS = "self.rngs"


def _drawn(function: str, shape: str, dtype: str) -> str | None:
    if dtype not in ("float32", "float64"):
        return None
    more = "" if dtype == "float32" else f", {dtype_text(dtype)}"
    return f"jax.random.{function}({KEYS}(), {shape}{more})"


def _of_size(function: str, size: Sequence[Any], dtype: Dtype | None) -> str | None:
    return _drawn(function, sizes_text(size), dtype_name(dtype, "float32"))


@template("aten.randn.default")
def randn(size: Sequence[Any], *, dtype: Dtype | None = None) -> str | None:
    return _of_size("normal", size, dtype)


@template("aten.rand.default")
def rand(size: Sequence[Any], *, dtype: Dtype | None = None) -> str | None:
    return _of_size("uniform", size, dtype)


@template("aten.randn_like.default")
def randn_like(x: Operand, *, dtype: Dtype | None = None) -> str | None:
    return _drawn("normal", f"{x}.shape", dtype_name(dtype, x.dtype))


@template("aten.rand_like.default")
def rand_like(x: Operand, *, dtype: Dtype | None = None) -> str | None:
    return _drawn("uniform", f"{x}.shape", dtype_name(dtype, x.dtype))


@template("aten.normal_functional.default")
def normal(x: Operand, mean: float = 0.0, std: float = 1.0) -> str | None:
    drawn = _drawn("normal", f"{x}.shape", x.dtype)
    plain = not isinstance(mean, SizeText) and not isinstance(std, SizeText)
    if drawn is None or not plain or (mean, std) == (0.0, 1.0):
        return drawn if plain else None
    return f"({mean} + {std} * {drawn})" if mean else f"({std} * {drawn})"


@template("aten.uniform.default")
def uniform(x: Operand, low: float = 0.0, high: float = 1.0) -> str | None:
    drawn = _drawn("uniform", f"{x}.shape", x.dtype)
    if drawn is None or isinstance(low, SizeText) or isinstance(high, SizeText):
        return None
    return drawn if (low, high) == (0.0, 1.0) else f"({low} + {high - low} * {drawn})"
