"""What templates write with: numbers, dtypes, axes, casts where torch and JAX promote otherwise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from convert.porting.rendering.operands import Operand, SizeText, inside
from convert.porting.rules.promote import category, floating_of, result_type
from convert.program.graph import Dtype

# What JAX makes of these is of 32 bits where x64 is off, without a warning.
_PYTHON = {"int64": "int", "float64": "float", "complex128": "complex", "bool": "bool"}
_LARGEST = 2**31  # from here on a whole number does not fit where x64 is off


def dtype_text(dtype: str) -> str:
    """A dtype of torch's name, as one writes it."""
    return _PYTHON.get(dtype) or f"jnp.{dtype}"


def dtype_name(dtype: Dtype | Operand | str | None, default: str) -> str:
    """The name of a dtype argument."""
    return default if dtype is None else dtype if isinstance(dtype, str) else _named(dtype)


def _named(dtype: Dtype | Operand) -> str:
    return dtype.name if isinstance(dtype, Dtype) else dtype.dtype


def cast(x: Operand, dtype: str) -> str:
    """The array as one of the dtype."""
    return str(x) if x.dtype == dtype else f"{x}.astype({dtype_text(dtype)})"


def kind(x: Operand | str) -> int:
    """bool 0, integer 1, float 2, complex 3."""
    return category(np.dtype(x if isinstance(x, str) else x.dtype))


def number(value: Any, dtype: str = "") -> str | None:
    """A number or size, as a literal; turned into the kind of the dtype where one is named. None
    where it does not fit."""
    if isinstance(value, SizeText):
        return str(value) if not dtype or kind(dtype) in (1, 2) else None
    if dtype:
        value = _of_kind(value, kind(dtype))
        if value is None:
            return None
        if kind(dtype) == 1:
            info = np.iinfo(np.dtype(dtype))
            if not info.min <= value <= info.max or abs(value) >= _LARGEST:
                return None
    if isinstance(value, float) and not math.isfinite(value):
        return "jnp.nan" if math.isnan(value) else "jnp.inf" if value > 0 else "(-jnp.inf)"
    if isinstance(value, complex) and not (math.isfinite(value.real + value.imag)):
        return None
    return inside(_extreme(value, dtype) or repr(value))


def _extreme(value: Any, dtype: str) -> str:
    """The lowest or highest value of a float's dtype, by name."""
    dtype = dtype or "float32"
    if dtype in ("float16", "float32") and abs(value) == float(np.finfo(np.dtype(dtype)).max):
        return f"jnp.finfo({dtype_text(dtype)}).{'max' if value > 0 else 'min'}"
    return ""


def _of_kind(value: Any, kind_: int) -> Any:
    """A number as torch's cast to a kind of dtype makes it."""
    if isinstance(value, complex) and kind_ < 3:
        return None
    if kind_ == 1 and isinstance(value, float) and not math.isfinite(value):
        return None
    if kind_ == 2 and isinstance(value, int) and not isinstance(value, bool):
        return value if abs(value) < _LARGEST else float(value)  # beside a float it becomes one
    return (bool, int, float, complex)[kind_](value)


# -- promotion ----------------------------------------------------------------------------------


def _sample(value: Any) -> Any:
    """A value that promotes as this one does in torch."""
    if isinstance(value, Operand):
        return np.empty((0,) if value.shape else (), np.dtype(value.dtype))
    return 1 if isinstance(value, SizeText) else value


def common(*values: Any) -> str:
    """torch's dtype of arrays and numbers together."""
    return str(result_type(*map(_sample, values)))


@lru_cache(maxsize=4096)
def _jax_agrees(given: tuple[Any, ...], wanted: str) -> bool:
    """Whether JAX promotes dtypes (by name) and Python's types as torch does, x64 or not, and not
    weakly."""
    for x64 in (True, False):
        with jax.enable_x64(x64):
            dtypes = [
                jax.dtypes.canonicalize_dtype(g) if isinstance(g, str) else g(1) for g in given
            ]
            found = jax.dtypes.result_type(*dtypes, return_weak_type_flag=True)
            if found != (jax.dtypes.canonicalize_dtype(wanted), False):
                return False
    return True


def _fits(value: Any, dtype: str) -> bool:
    """Whether a number may stand beside an array of the dtype as it is."""
    if (
        isinstance(value, Operand | SizeText)
        or not isinstance(value, int)
        or isinstance(value, bool)
    ):
        return True
    return number(value, dtype) is not None if kind(dtype) == 1 else abs(value) < _LARGEST


def together(*values: Any, floating: bool = False) -> list[str] | None:
    """Arrays and numbers as they are written for JAX to compute in torch's common dtype; in its
    float where `floating`. As few are cast as can be. None where a number does not fit."""
    dtype = common(*values)
    if floating:
        dtype = str(floating_of(np.dtype(dtype)))
    numbers = [v for v in values if not isinstance(v, Operand)]
    if not all(_fits(v, dtype) for v in numbers):
        return None
    names = [
        v.dtype if isinstance(v, Operand) else int if isinstance(v, SizeText) else type(v)
        for v in values
    ]
    other = [i for i, v in enumerate(values) if isinstance(v, Operand) and v.dtype != dtype]
    for n in range(len(other) + 1):
        for chosen in itertools.combinations(other, n):
            given = [dtype if i in chosen else name for i, name in enumerate(names)]
            if _jax_agrees(tuple(given), dtype):
                return [_written(v, dtype if i in chosen else "") for i, v in enumerate(values)]
    return None


def combined(text: str, *values: Any, floating: bool = False) -> str | None:
    """A text with the arrays and numbers in its gaps, as `together` writes them."""
    parts = together(*values, floating=floating)
    return None if parts is None else text.format(*parts)


def _written(value: Any, dtype: str) -> str:
    if isinstance(value, Operand):
        return cast(value, dtype) if dtype else str(value)
    text = number(value)
    assert text is not None
    return text


def in_dtype(value: Any, dtype: str) -> str | None:
    """An array or a number beside arrays of the dtype, turned into it."""
    return cast(value, dtype) if isinstance(value, Operand) else number(value, dtype)


def one_dtype(*arrays: Operand | None) -> bool:
    """Whether all arrays that are given have the same dtype."""
    return len({a.dtype for a in arrays if a is not None}) == 1


def floats(x: Operand) -> str:
    """The array; as float32, torch's default, where it is of integers."""
    return cast(x, str(floating_of(np.dtype(x.dtype))))


# -- axes ---------------------------------------------------------------------------------------


def axis_text(dim: Any) -> str:
    """An axis or several, as an `axis` argument."""
    if not isinstance(dim, list | tuple):
        return str(dim)
    return str(dim[0]) if len(dim) == 1 else f"({', '.join(map(str, dim))})"


def sizes_text(sizes: Sequence[Any]) -> str:
    """A shape as a tuple."""
    inner = ", ".join(map(str, sizes))
    return f"({inner},)" if len(sizes) == 1 else f"({inner})"


def value_of(size: Any) -> Any:
    """A size to be compared: the number, or the expression that it is."""
    return size.value if isinstance(size, SizeText) else size


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are known to be equal."""
    return [value_of(s) for s in a] == [value_of(s) for s in b]


def known(shape: Sequence[Any]) -> bool:
    """Whether every size is a number."""
    return all(isinstance(value_of(s), int) for s in shape)


def at(dim: int, ndim: int, index: str) -> str:
    """A subscript that indexes one axis: `:, 1:` for the second one."""
    dim %= ndim
    after = ndim - 1 - dim
    if dim > 1 and after < 2 and after < dim:
        return ", ".join(["...", index, *[":"] * after])
    return ", ".join([*[":"] * dim, index])


def taken(x: Operand, dim: int, index: str) -> str:
    """The array indexed on one axis."""
    return f"{x}[{at(dim, len(x.shape), index)}]"


def pairs(values: Sequence[tuple[Any, Any]]) -> str:
    """Pairs of numbers, as a tuple of tuples."""
    inner = ", ".join(f"({a}, {b})" for a, b in values)
    return f"({inner},)" if len(values) == 1 else f"({inner})"
