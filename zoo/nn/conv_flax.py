"""NNX convolutions with torch's arguments and padding, channels last.

With a stride, Flax's "SAME" differs from torch's `padding=k//2`: for stride 2 and an even size
it pads one more on the right than on the left; torch pads both alike. Here padding is explicit.

`padding` is for both ends, of all axes or of each, "same" (stride 1 only) or "valid". What lies
there is zeros, or with `padding_mode` "reflect", "replicate" or "circular" more of the input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from zoo.nn.options_flax import Options

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
Sizes = int | tuple[int, ...]  # one number for every axis, or one for each


class _Conv(nnx.Conv):
    axes: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        **kw: Unpack[Options],
    ) -> None:
        kernel, strides, dilations = (each(x, self.axes) for x in (kernel_size, stride, dilation))
        super().__init__(
            in_channels,
            out_channels,
            kernel,
            strides,
            padding=pads(padding, kernel, strides, dilations),
            kernel_dilation=dilations,
            feature_group_count=groups,
            use_bias=bias,
            conv_general_dilated=_CONVOLUTIONS[padding_mode],
            **kw,
        )


class Conv1d(_Conv):
    """nnx.Conv with the arguments of torch's Conv1d: (B, T, in) -> (B, T', out)."""

    axes = 1


class Conv2d(_Conv):
    """nnx.Conv with the arguments of torch's Conv2d: (B, H, W, in) -> (B, H', W', out)."""

    axes = 2


class Conv3d(_Conv):
    """nnx.Conv with the arguments of torch's Conv3d: (B, D, H, W, in) -> (B, D', H', W', out)."""

    axes = 3


def each(x: Sizes, axes: int) -> tuple[int, ...]:
    """One number for every axis, or one for each."""
    return (x,) * axes if isinstance(x, int) else tuple(x)


def pads(
    padding: Sizes | str,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[tuple[int, int], ...]:
    """(before, after) for every axis, as torch pads.

    "same" pads by dilation * (kernel - 1) in all, and by one more after than before if that is
    odd. ValueError for any other string, and for "same" with a stride, which torch refuses too.
    """
    if padding == "valid":
        padding = 0
    if isinstance(padding, int):
        padding = (padding,) * len(kernel)
    if not isinstance(padding, str):
        return tuple((p, p) for p in padding)
    if padding != "same" or any(s != 1 for s in stride):
        raise ValueError(
            f"padding {padding!r} with stride {stride}; torch has 'same' with stride 1"
        )
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return tuple((t // 2, t - t // 2) for t in totals)


def _convolution(
    mode: str, x: Array, kernel: Array, strides: Any, padding: Any, **kw: Any
) -> Array:
    """lax.conv_general_dilated whose padding is more of the input; `mode` is jnp.pad's."""
    space = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, kw["dimension_numbers"])
    around = [(0, 0)] * x.ndim
    for axis, ends in zip(space.lhs_spec[2:], padding, strict=True):
        around[axis] = ends
    x = jnp.pad(x, around, mode=mode)
    return jax.lax.conv_general_dilated(x, kernel, strides, "VALID", **kw)


_CONVOLUTIONS: dict[PaddingMode, Callable[..., Array]] = {
    "zeros": jax.lax.conv_general_dilated,
    "reflect": partial(_convolution, "reflect"),
    "replicate": partial(_convolution, "edge"),
    "circular": partial(_convolution, "wrap"),
}
