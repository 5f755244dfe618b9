"""Convolutions of any number of axes. x (N, C, *D) or (C, *D); weight (O, C / groups, *K)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from convert.porting.rules import rule
from convert.porting.rules.promote import refuse


def tupled(value: Any, n: int) -> tuple[int, ...]:
    """torch's int, or list of 1 or n ints, as n ints."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * n if len(values) == 1 else values


def _letters(n: int) -> tuple[str, str, str]:
    space = "DHW"[-n:]
    return f"NC{space}", f"OI{space}", f"NC{space}"


def _transposed_kernel(weight: Any, groups: int) -> Any:
    """(C, O / groups, *K) as the kernel of a forward convolution: flipped, (O, C / groups, *K)."""
    c, o, *k = weight.shape
    weight = jnp.flip(weight, tuple(range(2, weight.ndim)))
    weight = weight.reshape(groups, c // groups, o, *k).swapaxes(1, 2)
    return weight.reshape(groups * o, c // groups, *k)


def convolve(
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool = False,
    output_padding: Any = 0,
    groups: int = 1,
) -> Any:
    """torch's convolution; `padding` is ints, "valid" or "same"."""
    n = weight.ndim - 2
    if n > 3:
        raise refuse("a convolution of more than three axes")
    stride, dilation = tupled(stride, n), tupled(dilation, n)
    single = x.ndim == n + 1
    x = x[None] if single else x
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if padding == "same":
        pads = [(r // 2, r - r // 2) for r in reach]
    else:
        pads = [(p, p) for p in tupled(0 if padding == "valid" else padding, n)]
    inner = (1,) * n
    if transposed:
        more = tupled(output_padding, n)
        weight = _transposed_kernel(weight, groups)
        ends = zip(reach, pads, more, strict=True)
        pads = [(r - p, r - p + m) for r, (p, _), m in ends]
        stride, inner = inner, stride
    y = lax.conv_general_dilated(
        x,
        weight,
        stride,
        pads,
        lhs_dilation=inner,
        rhs_dilation=dilation,
        dimension_numbers=_letters(n),
        feature_group_count=groups,
    )
    y = y if bias is None else y + bias.reshape(-1, *(1,) * n)
    return y[0] if single else y


@rule(
    "aten.conv1d.default",
    "aten.conv2d.default",
    "aten.conv3d.default",
    "aten.conv1d.padding",
    "aten.conv2d.padding",
    "aten.conv3d.padding",
)
def conv(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    return convolve(x, weight, bias, stride, padding, dilation, groups=groups)


@rule("aten._convolution_mode.default")
def convolution_mode(
    x: Any, weight: Any, bias: Any, stride: Any, padding: str, dilation: Any, groups: int
) -> Any:
    return convolve(x, weight, bias, stride, padding, dilation, groups=groups)


@rule(
    "aten.conv_transpose1d.default",
    "aten.conv_transpose2d.input",
    "aten.conv_transpose3d.input",
)
def conv_transpose(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    return convolve(x, weight, bias, stride, padding, dilation, True, output_padding, groups)


@rule("aten.convolution.default", "aten._convolution.default")
def convolution(
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    *_: Any,
) -> Any:
    return convolve(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)


def _windows(size: int, kernel: int, dilation: int, stride: int) -> tuple[Any, int]:
    """Places (outputs, kernel) of a window sliding over `size`, and the number of outputs."""
    count = (size - dilation * (kernel - 1) - 1) // stride + 1
    starts = jnp.arange(count) * stride
    return starts[:, None] + jnp.arange(kernel) * dilation, count


@rule("aten.im2col.default")
def im2col(
    x: Any,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Any:
    """nn.Unfold: (N, C, H, W) -> (N, C * kh * kw, outputs)."""
    kernel_size, stride = tupled(kernel_size, 2), tupled(stride, 2)
    dilation, padding = tupled(dilation, 2), tupled(padding, 2)
    single = x.ndim == 3
    x = x[None] if single else x
    x = jnp.pad(x, [(0, 0), (0, 0), *[(p, p) for p in padding]])
    parts = zip(x.shape[2:], kernel_size, dilation, stride, strict=True)
    (rows, h), (columns, w) = (_windows(*part) for part in parts)
    taken = x[:, :, rows[:, None, :, None], columns[None, :, None, :]]
    depth = x.shape[1] * kernel_size[0] * kernel_size[1]
    y = taken.transpose(0, 1, 4, 5, 2, 3).reshape(x.shape[0], depth, h * w)
    return y[0] if single else y


@rule("aten.col2im.default")
def col2im(
    x: Any,
    output_size: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Any:
    """nn.Fold: what im2col took is added back into its place."""
    single = x.ndim == 2
    x = x[None] if single else x
    sizes = [s + 2 * p for s, p in zip(output_size, padding, strict=True)]
    parts = zip(sizes, kernel_size, dilation, stride, strict=True)
    (rows, h), (columns, w) = (_windows(*part) for part in parts)
    kh, kw = kernel_size
    depth = x.shape[1] // (kh * kw)
    pieces = x.reshape(x.shape[0], depth, kh, kw, h, w).transpose(0, 1, 4, 5, 2, 3)
    y = jnp.zeros((*pieces.shape[:2], *sizes), x.dtype)
    y = y.at[:, :, rows[:, None, :, None], columns[None, :, None, :]].add(pieces)
    top, left = padding
    y = y[:, :, top : top + output_size[0], left : left + output_size[1]]
    return y[0] if single else y
