"""torch's layers in NNX for data in torch's axes, (B, C, *D): convolutions, norms, PReLU.

Arguments are torch's; parameters are NNX's, in NNX's axes, so that a checkpoint of the layer that
has channels last is one of these too. `pool_flax` and `conv_flax` have the same for channels last.
"""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from zoo.nn import batchnorm_flax, conv_flax, layers_flax
from zoo.nn.conv_flax import Sizes, each
from zoo.nn.options_flax import Options

_AXES = {1: ("NCT", "TIO", "NCT"), 2: ("NCHW", "HWIO", "NCHW"), 3: ("NCDHW", "DHWIO", "NCDHW")}


def _convolved(layer: nnx.Conv, x: Array) -> Array:
    """x (B, in, *D), or (in, *D) -> (B, out, *D'), or (out, *D')."""
    n = len(layer.kernel_size)
    bias = None if layer.bias is None else layer.bias[...]
    x, kernel, bias = layer.promote_dtype((x, layer.kernel[...], bias), dtype=layer.dtype)
    y = layer.conv_general_dilated(
        x if x.ndim == n + 2 else x[None],
        kernel,
        layer.strides,
        layer.padding,
        rhs_dilation=layer.kernel_dilation,
        dimension_numbers=_AXES[n],
        feature_group_count=layer.feature_group_count,
    )
    y = y if x.ndim == n + 2 else y[0]
    return y if bias is None else y + bias.reshape(-1, *(1,) * n)


class Conv1d(conv_flax.Conv1d):
    """torch's Conv1d: (B, in, T) -> (B, out, T'). Its `kernel` is (K, in / groups, out)."""

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        return _convolved(self, inputs)


class Conv2d(conv_flax.Conv2d):
    """torch's Conv2d: (B, in, H, W) -> (B, out, H', W'). `kernel` is (KH, KW, in / groups, out)."""

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        return _convolved(self, inputs)


class Conv3d(conv_flax.Conv3d):
    """torch's Conv3d: (B, in, D, H, W) -> (B, out, D', H', W')."""

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        return _convolved(self, inputs)


class _ConvTranspose(nnx.ConvTranspose):
    axes: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        bias: bool = True,
        dilation: Sizes = 1,
        **kw: Unpack[Options],
    ) -> None:
        kernel, steps, cut, more, dilations = (
            each(x, self.axes) for x in (kernel_size, stride, padding, output_padding, dilation)
        )
        ends = zip(kernel, dilations, cut, more, strict=True)
        self.ends = tuple((d * (k - 1) - p, d * (k - 1) - p + m) for k, d, p, m in ends)
        super().__init__(
            in_channels,
            out_channels,
            kernel,
            steps,
            padding=self.ends,
            kernel_dilation=dilations,
            use_bias=bias,
            **kw,
        )

    def __call__(self, inputs: Array) -> Array:
        n = self.axes
        assert isinstance(self.strides, tuple)
        assert isinstance(self.kernel_dilation, tuple)
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        y = jax.lax.conv_general_dilated(
            x if x.ndim == n + 2 else x[None],
            kernel,
            (1,) * n,
            self.ends,
            lhs_dilation=self.strides,
            rhs_dilation=self.kernel_dilation,
            dimension_numbers=_AXES[n],
        )
        y = y if x.ndim == n + 2 else y[0]
        return y if bias is None else y + bias.reshape(-1, *(1,) * n)


class ConvTranspose1d(_ConvTranspose):
    """torch's ConvTranspose1d: (B, in, T) -> (B, out, T'). Flax's flipped `kernel` (K, in, out)."""

    axes = 1


class ConvTranspose2d(_ConvTranspose):
    """torch's ConvTranspose2d: (B, in, H, W) -> (B, out, H', W'); see ConvTranspose1d."""

    axes = 2


class ConvTranspose3d(_ConvTranspose):
    """torch's ConvTranspose3d: (B, in, D, H, W) -> (B, out, D', H', W'); see ConvTranspose1d."""

    axes = 3


class BatchNorm(batchnorm_flax.BatchNorm):
    """torch's BatchNorm1d, 2d and 3d: (B, C), (B, C, T), (B, C, H, W), (B, C, D, H, W)."""

    channels = 1


class GroupNorm(nnx.GroupNorm):
    """torch's GroupNorm: (B, C, *D), each of `num_groups` groups of channels to mean 0, variance 1.

    Computed in float32 or wider; its state is `scale` and `bias` (C,), without `affine` neither.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        **kw: Unpack[Options],
    ) -> None:
        super().__init__(
            num_channels, num_groups, epsilon=eps, use_bias=affine, use_scale=affine, **kw
        )

    def __call__(self, x: Array) -> Array:  # type: ignore[override]  # no mask
        affine = [p[...] for p in (self.scale, self.bias) if p is not None]
        given = self.dtype or jnp.result_type(x, *affine)
        wide = jnp.promote_types(given, jnp.float32)
        groups = x.astype(wide).reshape(x.shape[0], self.num_groups, -1)
        mean, var = groups.mean(-1, keepdims=True), groups.var(-1, keepdims=True)
        y = ((groups - mean) / jnp.sqrt(var + self.epsilon)).reshape(x.shape)
        if affine:
            scale, bias = (a.astype(wide).reshape(-1, *(1,) * (x.ndim - 2)) for a in affine)
            y = y * scale + bias
        return y.astype(given)


class InstanceNorm(GroupNorm):
    """torch's InstanceNorm1d, 2d and 3d, without running statistics: (B, C, *D)."""

    def __init__(
        self, num_features: int, eps: float = 1e-5, affine: bool = False, **kw: Unpack[Options]
    ) -> None:
        super().__init__(num_features, num_features, eps, affine, **kw)


class PReLU(layers_flax.PReLU):
    """torch's PReLU for (B, C, *D): one weight, or one a channel."""

    def __call__(self, x: Array) -> Array:
        weight = self.weight[...]
        weight = weight.reshape(-1, *(1,) * max(x.ndim - 2, 0)) if weight.size > 1 else weight
        return jnp.where(x > 0, x, weight * x)
