"""torch's type promotion, in one place: which dtype a result has, and what dtypes do to values.

Tensors with dimensions decide before those without, and those before Python's scalars; a later one
counts only where its category (bool, int, float, complex) is higher. JAX's own promotion differs:
there a zero-dim array counts in full, and an integer divided becomes float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_DEFAULT = ContextVar("_DEFAULT", default="float32")
_OPMATH = (np.dtype(jnp.bfloat16), np.dtype(np.float16))


def default_float() -> np.dtype:
    """torch's default dtype, which integers become in a float's function."""
    return np.dtype(_DEFAULT.get())


@contextmanager
def defaulting(dtype: str) -> Iterator[None]:
    """A context in which torch's default dtype is another one."""
    token = _DEFAULT.set(dtype)
    try:
        yield
    finally:
        _DEFAULT.reset(token)


def is_array(value: Any) -> bool:
    """Whether a value is a tensor in torch's sense: an array of JAX's or NumPy's."""
    return isinstance(value, jax.Array | np.ndarray | np.generic)


def category(dtype: Any) -> int:
    """bool 0, integer 1, float 2, complex 3."""
    if dtype == np.bool_:
        return 0
    kinds = (jnp.integer, jnp.floating, jnp.complexfloating)
    return 1 + next(i for i, kind in enumerate(kinds) if jnp.issubdtype(dtype, kind))


def promote_types(a: Any, b: Any) -> np.dtype:
    """The dtype of two tensors of one rank together; int64 with float16 is float16."""
    dtypes = {np.dtype(a), np.dtype(b)}
    if len(dtypes) == 1:
        return next(iter(dtypes))
    with jax.enable_x64(True):
        return np.dtype(jnp.promote_types(a, b))


def _scalar_dtype(value: Any) -> np.dtype:
    own = default_float()
    kinds = ((bool, np.bool_), (int, np.int64), (float, own), (complex, complex_of(own)))
    found: np.dtype = np.dtype(next(d for kind, d in kinds if isinstance(value, kind)))
    return found


def _combine(higher: np.dtype | None, lower: np.dtype | None) -> np.dtype | None:
    """The dtype of two ranks together (c10's `combine_categories`)."""
    if higher is None or lower is None:
        return higher or lower
    if category(higher) == 3 or (category(higher) == 2 and category(lower) < 3):
        return higher
    if category(higher) == 2:
        return complex_of(higher)
    if category(higher) == 0 or category(lower) >= 2:
        return promote_types(higher, lower)
    return higher


def result_type(*values: Any) -> np.dtype:
    """torch.result_type of tensors and Python scalars; None does not count."""
    ranks: list[np.dtype | None] = [None, None, None]
    for value in values:
        if value is None:
            continue
        rank = 2 if not is_array(value) else 0 if value.ndim else 1
        dtype = np.dtype(value.dtype) if rank < 2 else _scalar_dtype(value)
        found = ranks[rank]
        ranks[rank] = dtype if found is None else promote_types(found, dtype)
    result = _combine(ranks[0], _combine(ranks[1], ranks[2]))
    assert result is not None
    return result


def complex_of(dtype: Any) -> np.dtype:
    """The complex dtype of a real one."""
    return np.dtype(np.complex128 if np.dtype(dtype) == np.float64 else np.complex64)


def real_of(dtype: Any) -> np.dtype:
    """The real dtype of a complex one; any other stays."""
    real: np.dtype = np.dtype(dtype)
    if category(dtype) == 3:
        real = np.dtype("f8" if real == np.complex128 else "f4")
    return real


def floating_of(dtype: Any) -> np.dtype:
    """The dtype of a float's function of this one: integers become torch's default."""
    return default_float() if category(dtype) < 2 else np.dtype(dtype)


def sum_dtype(dtype: Any) -> np.dtype:
    """The dtype of a sum: int64 for bool and integers."""
    return np.dtype(np.int64) if category(dtype) < 2 else np.dtype(dtype)


def cast(value: Any, dtype: Any) -> Any:
    """The value as an array of the dtype; truncated from float to integer, without imaginary part
    from complex. Without x64 it is the dtype that JAX has for it."""
    if getattr(dtype, "name", "") == "complex32":
        raise refuse("complex32, which JAX has not")
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    array = jnp.asarray(value) if is_array(value) else np.asarray(value)
    if array.dtype == dtype:
        return jnp.asarray(array)
    if dtype == np.bool_:
        return jnp.asarray(array) != 0
    if category(array.dtype) == 3 and category(dtype) < 3:
        array = array.real
    if category(array.dtype) == 2 and dtype == np.uint8:  # wraps, where JAX saturates
        array = lax.convert_element_type(array, np.int32)
    return lax.convert_element_type(array, dtype)


def together(*values: Any) -> list[Any]:
    """Tensors and scalars as arrays of their common dtype."""
    dtype = result_type(*values)
    return [cast(value, dtype) for value in values]


def floats(*values: Any) -> list[Any]:
    """Tensors and scalars as arrays of their common dtype, integers as torch's default float."""
    dtype = floating_of(result_type(*values))
    return [cast(value, dtype) for value in values]


def wide(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one float array, in float32 where it comes in 16 bits, as torch computes."""

    def widened(x: Any, *args: Any, **kwargs: Any) -> Any:
        if x.dtype not in _OPMATH:
            return function(x, *args, **kwargs)
        return cast(function(cast(x, np.float32), *args, **kwargs), x.dtype)

    return widened


def opmath(dtype: Any) -> np.dtype:
    """The dtype that torch computes in: float32 for floats of 16 bits."""
    return np.dtype(np.float32) if np.dtype(dtype) in _OPMATH else np.dtype(dtype)


def extremes(dtype: Any) -> tuple[Any, Any]:
    """The lowest and the highest value of a dtype, infinite for floats."""
    if category(dtype) == 0:
        return np.False_, np.True_
    if category(dtype) >= 2:
        return np.asarray(-np.inf, dtype)[()], np.asarray(np.inf, dtype)[()]
    info = np.iinfo(dtype)
    return np.asarray(info.min, dtype)[()], np.asarray(info.max, dtype)[()]


def refuse(what: str) -> NotImplementedError:
    """The error of a rule that does not support the value of an argument."""
    return NotImplementedError(what)
