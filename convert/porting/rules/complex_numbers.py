"""Complex numbers, and Fourier transforms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from convert.porting.rules import rule, rules_of
from convert.porting.rules.promote import (
    cast,
    category,
    complex_of,
    default_float,
    floats,
    refuse,
    together,
)


@rule("aten.complex.default")
def complex_(real: Any, imag: Any) -> Any:
    return lax.complex(*jnp.broadcast_arrays(real, imag))


@rule("aten.polar.default")
def polar(size: Any, angle: Any) -> Any:
    return lax.complex(*jnp.broadcast_arrays(size * jnp.cos(angle), size * jnp.sin(angle)))


@rule("aten.view_as_complex.default", "aten.view_as_complex_copy.default")
def view_as_complex(x: Any) -> Any:
    return lax.complex(x[..., 0], x[..., 1])


@rule("aten.view_as_real.default", "aten.view_as_real_copy.default")
def view_as_real(x: Any) -> Any:
    return jnp.stack([jnp.real(x), jnp.imag(x)], axis=-1)


def _angle(x: Any) -> Any:
    (x,) = floats(x)
    if category(x.dtype) == 3:
        return jnp.angle(x)
    return jnp.where(x < 0, math.pi, jnp.where(jnp.isnan(x), x, 0)).astype(x.dtype)


rules_of(
    {
        "real": lambda x: jnp.real(x) if category(x.dtype) == 3 else x,
        "imag": jnp.imag,
        "angle": _angle,
        "_conj": jnp.conj,
        "_conj_physical": jnp.conj,
        "conj_physical": lambda x: jnp.conj(x) if category(x.dtype) == 3 else x,
        "conj": lambda x: jnp.conj(x) if category(x.dtype) == 3 else x,
    }.items()
)

# -- Fourier ------------------------------------------------------------------------------------


def _complex(x: Any) -> Any:
    (x,) = floats(x)
    return x if category(x.dtype) == 3 else cast(x, complex_of(x.dtype))


def _one(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """A transform of one axis; of a "real" or "complex" input."""

    def transform(x: Any, n: int | None = None, dim: int = -1, norm: str | None = None) -> Any:
        x = _complex(x) if kind == "complex" else floats(x)[0]
        return function(x, n, axis=dim, norm=norm)

    return transform


def _several(
    function: Callable[..., Any], kind: str, default: Sequence[int] | None
) -> Callable[..., Any]:
    def transform(x: Any, s: Any = None, dim: Any = default, norm: str | None = None) -> Any:
        x = _complex(x) if kind == "complex" else floats(x)[0]
        if dim is None:
            dim = range(x.ndim) if s is None else range(x.ndim - len(s), x.ndim)
        dims = tuple(dim) if not isinstance(dim, int) else (dim,)
        if s is not None:
            s = [x.shape[d] if n == -1 else n for n, d in zip(s, dims, strict=True)]
        if not dims:
            return x
        return function(x, s, axes=dims, norm=norm)

    return transform


_KINDS = {"fft": "complex", "ifft": "complex", "rfft": "real", "irfft": "complex"}
for _name, _kind in _KINDS.items():
    rules_of([(f"fft_{_name}", _one(getattr(jnp.fft, _name), _kind))])
    _function = getattr(jnp.fft, f"{_name}n")
    rules_of([(f"fft_{_name}n", _several(_function, _kind, None))])
    rules_of([(f"fft_{_name}2", _several(_function, _kind, (-2, -1)))])
rules_of([("fft_hfft", _one(jnp.fft.hfft, "complex")), ("fft_ihfft", _one(jnp.fft.ihfft, "real"))])


@rule("aten.fft_fftshift.default")
def fftshift(x: Any, dim: Any = None) -> Any:
    return jnp.fft.fftshift(x, dim if dim is None else tuple(dim))


@rule("aten.fft_ifftshift.default")
def ifftshift(x: Any, dim: Any = None) -> Any:
    return jnp.fft.ifftshift(x, dim if dim is None else tuple(dim))


@rule("aten.fft_fftfreq.default")
def fftfreq(n: int, d: float = 1.0, *, dtype: Any = None) -> Any:
    return cast(np.fft.fftfreq(n, d), default_float() if dtype is None else dtype)


@rule("aten.fft_rfftfreq.default")
def rfftfreq(n: int, d: float = 1.0, *, dtype: Any = None) -> Any:
    return cast(np.fft.rfftfreq(n, d), default_float() if dtype is None else dtype)


def _scale(n: int, normalization: int) -> float:
    """0 none, 1 by the root of n, 2 by n."""
    return (1.0, 1 / math.sqrt(n), 1 / n)[normalization]


def _lengths(x: Any, dims: Sequence[int], last: int | None = None) -> int:
    sizes = [x.shape[d] for d in dims]
    return math.prod(sizes if last is None else [*sizes[:-1], last])


@rule("aten._fft_c2c.default")
def fft_c2c(x: Any, dim: Sequence[int], normalization: int, forward: bool) -> Any:
    n = _lengths(x, dim)
    if forward:
        return jnp.fft.fftn(x, axes=tuple(dim)) * _scale(n, normalization)
    return jnp.fft.ifftn(x, axes=tuple(dim)) * (n * _scale(n, normalization))


@rule("aten._fft_r2c.default")
def fft_r2c(x: Any, dim: Sequence[int], normalization: int, onesided: bool) -> Any:
    n = _lengths(x, dim)
    transform = jnp.fft.rfftn if onesided else jnp.fft.fftn
    return transform(x, axes=tuple(dim)) * _scale(n, normalization)


@rule("aten._fft_c2r.default")
def fft_c2r(x: Any, dim: Sequence[int], normalization: int, last_dim_size: int) -> Any:
    n = _lengths(x, dim, last_dim_size)
    sizes = [*(x.shape[d] for d in dim[:-1]), last_dim_size]
    return jnp.fft.irfftn(x, sizes, axes=tuple(dim)) * (n * _scale(n, normalization))


@rule("aten.stft.center")
def stft(
    x: Any,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Any = None,
    center: bool = False,
    pad_mode: str = "reflect",
    normalized: bool = False,
    onesided: bool | None = None,
    return_complex: bool | None = None,
    align_to_window: bool | None = None,
) -> Any:
    """x (T) or (B, T) -> (..., frequencies, frames)."""
    if not return_complex or align_to_window:
        raise refuse("stft with return_complex=False or align_to_window=True")
    hop, length = hop_length or n_fft // 4, win_length or n_fft
    if center:
        pads = [(0, 0)] * (x.ndim - 1) + [(n_fft // 2, n_fft // 2)]
        x = jnp.pad(x, pads, mode={"reflect": "reflect", "constant": "constant"}[pad_mode])
    frames = np.arange((x.shape[-1] - n_fft) // hop + 1)[:, None] * hop + np.arange(n_fft)
    shape = jnp.ones((length,), x.dtype) if window is None else window
    left = (n_fft - length) // 2
    shape = jnp.pad(shape, (left, n_fft - length - left))
    real = category(x.dtype) == 2 and category(shape.dtype) == 2
    one_sided = real if onesided is None else onesided
    x, shape = together(x, shape)
    transform = jnp.fft.rfft if one_sided else jnp.fft.fft
    y = transform(x[..., frames] * shape) * (1 / math.sqrt(n_fft) if normalized else 1.0)
    return jnp.swapaxes(y, -1, -2)


@rule("aten.stft.default")
def stft_from_the_start(
    x: Any,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Any = None,
    normalized: bool = False,
    onesided: bool | None = None,
    return_complex: bool | None = None,
    align_to_window: bool | None = None,
) -> Any:
    given = (False, "reflect", normalized, onesided, return_complex, align_to_window)
    return stft(x, n_fft, hop_length, win_length, window, *given)
