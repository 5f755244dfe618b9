"""torch's pooling and flattening for arrays with channels last: (B, *D, C), any number of axes.

Functions under the names of torch.nn.functional, modules under those of torch.nn. Sizes are
torch's: one number for every axis, or one for each.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array

from zoo.nn.conv_flax import Sizes, each
from zoo.nn.resize_flax import resized_over
from zoo.nn.windows_flax import adaptive_mean_over, max_over, mean_over


def max_pool(
    x: Array,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
) -> Array:
    """The largest value of every window; padding is -inf."""
    return max_over(x, _space(x), kernel_size, stride, padding, ceil_mode)


def avg_pool(
    x: Array,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Array:
    """The mean of every window; padding is zeros, which count if `count_include_pad`."""
    return mean_over(x, _space(x), kernel_size, stride, padding, ceil_mode, count_include_pad)


def adaptive_avg_pool(x: Array, output_size: int | tuple[int | None, ...]) -> Array:
    """(B, *D, C) -> (B, *output_size, C): the mean of the windows that torch chooses."""
    axes = _space(x)
    sizes = each(output_size, len(axes)) if isinstance(output_size, int) else output_size
    return adaptive_mean_over(x, axes, sizes)


def interpolate(
    x: Array,
    size: Sizes | None = None,
    scale_factor: Sizes | None = None,
    mode: str = "nearest",
    align_corners: bool = False,
) -> Array:
    """(B, *D, C) -> (B, *D', C), of `size` or `scale_factor` times as large.

    `mode` is "nearest", "nearest-exact" or "linear", which is torch's bilinear and trilinear too.
    """
    return resized_over(x, _space(x), size, scale_factor, mode, align_corners)


def pixel_shuffle(x: Array, upscale_factor: int) -> Array:
    """(B, H, W, C*r*r) -> (B, H*r, W*r, C); the channels are in torch's order."""
    r = upscale_factor
    B, H, W, C = x.shape
    x = x.reshape(B, H, W, C // (r * r), r, r).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(B, H * r, W * r, C // (r * r))


def pixel_unshuffle(x: Array, downscale_factor: int) -> Array:
    """(B, H*r, W*r, C) -> (B, H, W, C*r*r); the channels are in torch's order."""
    r = downscale_factor
    B, H, W, C = x.shape
    x = x.reshape(B, H // r, r, W // r, r, C).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(B, H // r, W // r, C * r * r)


max_pool2d, avg_pool2d, adaptive_avg_pool2d = max_pool, avg_pool, adaptive_avg_pool  # (B, H, W, C)


def flatten(x: Array) -> Array:
    """(B, H, W, C) -> (B, C*H*W), in torch's order, so that torch's next linear layer fits."""
    return jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1)


class MaxPool2d(nnx.Module):
    """(B, H, W, C) -> (B, H', W', C): `max_pool2d` as a module."""

    def __init__(
        self,
        kernel_size: Sizes,
        stride: Sizes | None = None,
        padding: Sizes = 0,
    ) -> None:
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding

    def __call__(self, x: Array) -> Array:
        return max_pool2d(x, self.kernel_size, self.stride, self.padding)


class AdaptiveAvgPool2d(nnx.Module):
    """(B, H, W, C) -> (B, *output_size, C): `adaptive_avg_pool2d` as a module."""

    def __init__(self, output_size: Sizes) -> None:
        self.output_size = output_size

    def __call__(self, x: Array) -> Array:
        return adaptive_avg_pool2d(x, self.output_size)


class Flatten(nnx.Module):
    """(B, H, W, C) -> (B, C*H*W): `flatten` as a module."""

    def __call__(self, x: Array) -> Array:
        return flatten(x)


def _space(x: Array) -> tuple[int, ...]:
    return tuple(range(1, x.ndim - 1))
