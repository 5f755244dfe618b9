"""NNX convolutions with torch's arguments and padding, channels last.

With a stride, Flax's "SAME" differs from torch's `padding=k//2`: for stride 2 and an even size
it pads one more on the right than on the left; torch pads both alike. Here padding is explicit.
"""

from __future__ import annotations

from typing import Unpack

from flax import nnx

from zoo.nn.options_flax import Options


class Conv1d(nnx.Conv):
    """nnx.Conv with the arguments of torch's Conv1d: (B, T, in) -> (B, T', out).

    `padding` is for both ends, or "same" (stride 1 only).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | str = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        **kw: Unpack[Options],
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            (kernel_size,),
            stride,
            padding=pads(padding, (kernel_size,), (stride,), (dilation,)),
            kernel_dilation=dilation,
            feature_group_count=groups,
            use_bias=bias,
            **kw,
        )


class Conv2d(nnx.Conv):
    """nnx.Conv with the arguments of torch's Conv2d: (B, H, W, in) -> (B, H', W', out).

    `padding` is for both ends, of both axes or of each, or "same" (stride 1 only).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        **kw: Unpack[Options],
    ) -> None:
        kernel, strides, dilations = (pair(x) for x in (kernel_size, stride, dilation))
        super().__init__(
            in_channels,
            out_channels,
            kernel,
            strides,
            padding=pads(padding, kernel, strides, dilations),
            kernel_dilation=dilations,
            feature_group_count=groups,
            use_bias=bias,
            **kw,
        )


def pair(x: int | tuple[int, int]) -> tuple[int, int]:
    """One number for both axes, or one for each."""
    return (x, x) if isinstance(x, int) else x


def pads(
    padding: int | tuple[int, ...] | str,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[tuple[int, int], ...]:
    """(before, after) for every axis, as torch pads.

    "same" pads by dilation * (kernel - 1) in all, and by one more after than before if that is
    odd. ValueError for any other string, and for "same" with a stride, which torch refuses too.
    """
    if isinstance(padding, int):
        padding = (padding,) * len(kernel)
    if not isinstance(padding, str):
        return tuple((p, p) for p in padding)
    if padding != "same" or any(s != 1 for s in stride):
        raise ValueError(f"padding {padding!r} with stride {stride}; 'same' with stride 1 is known")
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return tuple((t // 2, t - t // 2) for t in totals)
