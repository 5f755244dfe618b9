"""torch's pooling and flattening for arrays with channels last: (B, H, W, C).

Functions under the names of torch.nn.functional, modules under those of torch.nn.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from zoo.nn.conv_flax import pair


def max_pool2d(
    x: Array,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
) -> Array:
    """The largest value of every window; padding is -inf."""
    window, edges = pair(kernel_size), _edges(padding)
    return nnx.max_pool(x, window, window if stride is None else pair(stride), edges)


def avg_pool2d(
    x: Array,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
) -> Array:
    """The mean of every window; padding is zeros, which count."""
    window, edges = pair(kernel_size), _edges(padding)
    return nnx.avg_pool(x, window, window if stride is None else pair(stride), edges)


def adaptive_avg_pool2d(x: Array, output_size: int | tuple[int, int]) -> Array:
    """(B, H, W, C) -> (B, *output_size, C): the mean of the windows that torch chooses.

    Window i of n over an axis of size s goes from floor(i*s/n) to ceil((i+1)*s/n): windows differ
    in length, overlap where s is not a multiple of n, and repeat where s is less than n.
    """
    for axis, n in zip((1, 2), pair(output_size), strict=True):
        size = x.shape[axis]
        windows = [(i * size // n, -(-(i + 1) * size // n)) for i in range(n)]
        means = [jax.lax.slice_in_dim(x, a, b, axis=axis).mean(axis) for a, b in windows]
        x = jnp.stack(means, axis)
    return x


def flatten(x: Array) -> Array:
    """(B, H, W, C) -> (B, C*H*W), in torch's order, so that torch's next linear layer fits."""
    return jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1)


class MaxPool2d(nnx.Module):
    """(B, H, W, C) -> (B, H', W', C): `max_pool2d` as a module."""

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding

    def __call__(self, x: Array) -> Array:
        return max_pool2d(x, self.kernel_size, self.stride, self.padding)


class AdaptiveAvgPool2d(nnx.Module):
    """(B, H, W, C) -> (B, *output_size, C): `adaptive_avg_pool2d` as a module."""

    def __init__(self, output_size: int | tuple[int, int]) -> None:
        self.output_size = output_size

    def __call__(self, x: Array) -> Array:
        return adaptive_avg_pool2d(x, self.output_size)


class Flatten(nnx.Module):
    """(B, H, W, C) -> (B, C*H*W): `flatten` as a module."""

    def __call__(self, x: Array) -> Array:
        return flatten(x)


def _edges(padding: int | tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """What nnx's pools take for torch's padding: (before, after) for each axis."""
    h, w = pair(padding)
    return (h, h), (w, w)
