"""torch convolutions with NNX's `dtype` and `param_dtype`, as in `zoo.nn.layers_torch`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from zoo.nn.layers_torch import promote

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class Conv1d(nn.Conv1d):
    """nn.Conv1d with `dtype` and `param_dtype`: (B, in, T) -> (B, out, T').

    `padding` is for both ends, or "same" (stride 1 only) or "valid".
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
        padding_mode: PaddingMode = "zeros",
        *,
        dtype: torch.dtype | None = None,
        param_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            dtype=param_dtype,
        )
        self.dtype = dtype

    def forward(self, input: Tensor) -> Tensor:
        return _forward(self, self.dtype, input)


class Conv2d(nn.Conv2d):
    """nn.Conv2d with `dtype` and `param_dtype`: (B, in, H, W) -> (B, out, H', W').

    `padding` is for both ends, of both axes or of each, or "same" (stride 1 only) or "valid".
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
        padding_mode: PaddingMode = "zeros",
        *,
        dtype: torch.dtype | None = None,
        param_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            dtype=param_dtype,
        )
        self.dtype = dtype

    def forward(self, input: Tensor) -> Tensor:
        return _forward(self, self.dtype, input)


class Conv3d(nn.Conv3d):
    """nn.Conv3d with `dtype` and `param_dtype`: (B, in, D, H, W) -> (B, out, D', H', W')."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        stride: int | tuple[int, int, int] = 1,
        padding: int | tuple[int, int, int] | str = 0,
        dilation: int | tuple[int, int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        *,
        dtype: torch.dtype | None = None,
        param_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            dtype=param_dtype,
        )
        self.dtype = dtype

    def forward(self, input: Tensor) -> Tensor:
        return _forward(self, self.dtype, input)


def _forward(
    conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, dtype: torch.dtype | None, input: Tensor
) -> Tensor:
    if conv.bias is None:
        x, weight = promote(dtype, input, conv.weight)
        return conv._conv_forward(x, weight, None)
    return conv._conv_forward(*promote(dtype, input, conv.weight, conv.bias))
