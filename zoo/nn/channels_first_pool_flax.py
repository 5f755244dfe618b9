"""torch's pools and resizing for data in torch's axes, (B, C, *D), any number of axes.

The functions of `pool_flax`, which is for channels last, under the same names.
"""

from __future__ import annotations

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
    """(B, C, *D) -> (B, C, *output_size): the mean of the windows that torch chooses."""
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
    """(B, C, *D) -> (B, C, *D'), of `size` or `scale_factor` times as large.

    `mode` is "nearest", "nearest-exact" or "linear", which is torch's bilinear and trilinear too.
    """
    return resized_over(x, _space(x), size, scale_factor, mode, align_corners)


def pixel_shuffle(x: Array, upscale_factor: int) -> Array:
    """(B, C*r*r, H, W) -> (B, C, H*r, W*r)."""
    r = upscale_factor
    B, C, H, W = x.shape
    x = x.reshape(B, C // (r * r), r, r, H, W).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(B, C // (r * r), H * r, W * r)


def pixel_unshuffle(x: Array, downscale_factor: int) -> Array:
    """(B, C, H*r, W*r) -> (B, C*r*r, H, W)."""
    r = downscale_factor
    B, C, H, W = x.shape
    x = x.reshape(B, C, H // r, r, W // r, r).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(B, C * r * r, H // r, W // r)


def _space(x: Array) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))
