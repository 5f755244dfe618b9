"""Padding of all modes. torch lists the last axis first: (left, right, top, bottom, ...)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from convert.porting.rules import rule
from convert.porting.rules.promote import cast


def _pairs(pad: Sequence[int], ndim: int) -> list[tuple[int, int]]:
    """The padding of each axis, from the first."""
    last_first = list(zip(pad[::2], pad[1::2], strict=True))
    return [(0, 0)] * (ndim - len(last_first)) + last_first[::-1]


@rule("aten.constant_pad_nd.default")
def constant_pad_nd(x: Any, pad: Sequence[int], value: Any = 0) -> Any:
    """Negative numbers cut off."""
    pairs = [(a, b, 0) for a, b in _pairs(pad, x.ndim)]
    return lax.pad(x, cast(value or 0, x.dtype), pairs)


def _places(n: int, before: int, after: int, mode: str) -> np.ndarray:
    """Which element each place of a padded axis holds."""
    at = np.arange(-before, n + after)
    if mode == "replicate":
        return np.clip(at, 0, n - 1)
    if mode == "circular":
        return at % n
    at = np.abs(at)
    return np.where(at >= n, 2 * (n - 1) - at, at)


def _by_place(x: Any, pad: Sequence[int], mode: str) -> Any:
    for axis, (before, after) in enumerate(_pairs(pad, x.ndim)):
        if before or after:
            x = jnp.take(x, _places(x.shape[axis], before, after, mode), axis=axis)
    return x


for _mode, _names in {
    "reflect": ("reflection_pad1d", "reflection_pad2d", "reflection_pad3d"),
    "replicate": ("replication_pad1d", "replication_pad2d", "replication_pad3d"),
    "circular": ("_pad_circular",),
}.items():
    rule(*(f"aten.{n}.default" for n in _names))(lambda x, pad, mode=_mode: _by_place(x, pad, mode))


@rule("aten.pad.default")
def pad(x: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    return constant_pad_nd(x, pad, value) if mode == "constant" else _by_place(x, pad, mode)


@rule("aten._pad_enum.default")
def pad_enum(x: Any, pad: Sequence[int], mode: int, value: float | None = None) -> Any:
    names = ("reflect", "replicate", "circular", "constant")  # at::padding_mode
    if names[mode] == "constant":
        return constant_pad_nd(x, pad, value)
    return _by_place(x, pad, names[mode])
