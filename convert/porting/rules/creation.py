"""Tensors made of nothing: constants, ranges, windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.porting.rules import rule
from convert.porting.rules.promote import cast, category, complex_of, default_float


def _filled(size: Sequence[int], value: Any, dtype: Any) -> Any:
    return jnp.broadcast_to(cast(value, dtype), tuple(size))


def _dtype_of(value: Any) -> np.dtype:
    own = default_float()
    kinds = ((bool, np.bool_), (int, np.int64), (complex, complex_of(own)))
    return np.dtype(next((d for kind, d in kinds if isinstance(value, kind)), own))


@rule("aten.full.default")
def full(size: Sequence[int], fill_value: Any, *, dtype: Any = None) -> Any:
    return _filled(size, fill_value, _dtype_of(fill_value) if dtype is None else dtype)


@rule("aten.full_like.default")
def full_like(x: Any, fill_value: Any, *, dtype: Any = None) -> Any:
    return _filled(x.shape, fill_value, x.dtype if dtype is None else dtype)


@rule("aten.new_full.default")
def new_full(x: Any, size: Sequence[int], fill_value: Any, *, dtype: Any = None) -> Any:
    return _filled(size, fill_value, x.dtype if dtype is None else dtype)


def _constant(value: int) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    def of_size(size: Sequence[int], *, dtype: Any = None) -> Any:
        return _filled(size, value, default_float() if dtype is None else dtype)

    def like(x: Any, *, dtype: Any = None) -> Any:
        return full_like(x, value, dtype=dtype)

    def new(x: Any, size: Sequence[int], *, dtype: Any = None) -> Any:
        return new_full(x, size, value, dtype=dtype)

    return of_size, like, new


# What is empty has any values: zeros here.
for _names, _value in {("zeros", "empty"): 0, ("ones",): 1}.items():
    for _name in _names:
        _of_size, _like, _new = _constant(_value)
        _overload = "memory_format" if _name == "empty" else "default"
        rule(f"aten.{_name}.{_overload}")(_of_size)
        rule(f"aten.{_name}_like.default")(_like)
        rule(f"aten.new_{_name}.default")(_new)


@rule("aten.empty_strided.default", "aten.empty_permuted.default")
def empty_strided(size: Sequence[int], _: Sequence[int], *, dtype: Any = None) -> Any:
    return _filled(size, 0, default_float() if dtype is None else dtype)


@rule("aten.new_empty_strided.default")
def new_empty_strided(
    x: Any, size: Sequence[int], stride: Sequence[int], *, dtype: Any = None
) -> Any:
    return new_full(x, size, 0, dtype=dtype)


@rule("aten.zero.default")
def zero(x: Any) -> Any:
    return jnp.zeros_like(x)


@rule("aten.fill.Scalar", "aten.fill.Tensor")
def fill(x: Any, value: Any) -> Any:
    return _filled(x.shape, value, x.dtype)


@rule("aten.scalar_tensor.default")
def scalar_tensor(value: Any, *, dtype: Any = None) -> Any:
    return cast(value, default_float() if dtype is None else dtype)


@rule("aten.copy.default")
def copy(x: Any, src: Any, non_blocking: bool = False) -> Any:
    return jnp.broadcast_to(cast(src, x.dtype), x.shape)


@rule("aten.arange.start_step")
def arange(start: Any, end: Any, step: Any = 1, *, dtype: Any = None) -> Any:
    whole = all(isinstance(v, int) for v in (start, end, step))
    dtype = np.dtype((np.int64 if whole else default_float()) if dtype is None else dtype)
    if category(dtype) < 2:
        start, end, step = (int(v) for v in (start, end, step))
    n = max(math.ceil((end - start) / step), 0)
    return cast(start + np.arange(n) * step, dtype)


@rule("aten.arange.start")
def arange_start(start: Any, end: Any, *, dtype: Any = None) -> Any:
    return arange(start, end, dtype=dtype)


@rule("aten.arange.default")
def arange_end(end: Any, *, dtype: Any = None) -> Any:
    return arange(0, end, dtype=dtype)


def _steps(start: Any, end: Any, steps: int, dtype: np.dtype) -> Any:
    """Evenly spaced values, computed in the dtype or, for those of few bits, in float64."""
    if steps == 1:
        return np.full(1, start)
    if category(dtype) < 2:
        step = (end - start) / (steps - 1) if steps else 0.0
        i = np.arange(steps)
        low, high = start + step * i, end - step * (steps - 1 - i)
        return np.trunc(np.where(i < steps // 2, low, high))
    return np.linspace(start, end, steps)


@rule("aten.linspace.default")
def linspace(start: Any, end: Any, steps: int, *, dtype: Any = None) -> Any:
    if dtype is None:
        own, imaginary = default_float(), isinstance(start, complex) or isinstance(end, complex)
        dtype = complex_of(own) if imaginary else own
    return cast(_steps(start, end, steps, np.dtype(dtype)), dtype)


@rule("aten.logspace.default")
def logspace(start: Any, end: Any, steps: int, base: float = 10.0, *, dtype: Any = None) -> Any:
    dtype = np.dtype(default_float() if dtype is None else dtype)
    return cast(np.asarray(base) ** np.linspace(start, end, steps), dtype)


@rule("aten.eye.default")
def eye(n: int, *, dtype: Any = None) -> Any:
    return eye_m(n, n, dtype=dtype)


@rule("aten.eye.m")
def eye_m(n: int, m: int, *, dtype: Any = None) -> Any:
    return cast(np.eye(n, m), default_float() if dtype is None else dtype)


@rule("aten.tril_indices.default")
def tril_indices(row: int, col: int, offset: int = 0, *, dtype: Any = None) -> Any:
    found = np.stack(np.tril_indices(row, offset, col))
    return cast(found, np.int64 if dtype is None else dtype)


@rule("aten.triu_indices.default")
def triu_indices(row: int, col: int, offset: int = 0, *, dtype: Any = None) -> Any:
    found = np.stack(np.triu_indices(row, offset, col))
    return cast(found, np.int64 if dtype is None else dtype)


@rule("aten.vander.default")
def vander(x: Any, N: int | None = None, increasing: bool = False) -> Any:  # noqa: N803
    x = cast(x, np.int64) if category(x.dtype) < 2 else x
    return jnp.vander(x, x.shape[0] if N is None else N, increasing)


# -- windows ------------------------------------------------------------------------------------


def _window(name: str, function: Callable[[np.ndarray, int], np.ndarray]) -> None:
    """Enter a window of n points: periodic is one of n + 1 without its last."""

    def window(n: int, periodic: bool = True, *, dtype: Any = None) -> Any:
        whole = n + 1 if periodic else n
        values = np.ones(n) if n <= 1 else function(np.arange(n), whole - 1)
        return cast(values, default_float() if dtype is None else dtype)

    rule(f"aten.{name}_window.default", f"aten.{name}_window.periodic")(window)


_window("hann", lambda i, n: 0.5 - 0.5 * np.cos(2 * np.pi * i / n))
_window("hamming", lambda i, n: 0.54 - 0.46 * np.cos(2 * np.pi * i / n))
_window("bartlett", lambda i, n: 1 - np.abs(2 * i / n - 1))
_window(
    "blackman",
    lambda i, n: 0.42 - 0.5 * np.cos(2 * np.pi * i / n) + 0.08 * np.cos(4 * np.pi * i / n),
)
