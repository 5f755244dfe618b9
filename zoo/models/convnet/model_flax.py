"""A small convolutional classifier in Flax NNX: the twin of model_torch.py.

B images, H x W pixels in each, C channels, which come last.
"""

from __future__ import annotations

from typing import Any

from flax import nnx
from jax import Array
from jax.nn import relu

from zoo.models.convnet.config import Config
from zoo.nn.conv_flax import Conv2d
from zoo.nn.pool_flax import flatten, max_pool2d
from zoo.nn.taps import Taps


class ConvNet(nnx.Module):
    """`dtype` is that of the computation, `param_dtype` of the weights; `rngs` is required, as
    everywhere in NNX."""

    def __init__(self, c: Config, **kw: Any) -> None:
        self.config = c
        channels = (c.in_channels, *c.channels)
        for i, n_out in enumerate(c.channels):
            conv = Conv2d(channels[i], n_out, c.kernel_size, c.stride, c.padding, **kw)
            setattr(self, f"conv{i + 1}", conv)
        widths = (c.channels[-1] * c.side**2, *c.hidden, c.num_classes)
        for i, n_out in enumerate(widths[1:]):
            setattr(self, f"fc{i + 1}", nnx.Linear(widths[i], n_out, **kw))

    def __call__(self, x: Array, taps: bool = False) -> Any:
        """(B, H, W, C) -> logits (B, num_classes); `taps=True` adds {layer: what it gives}."""
        c, tap = self.config, Taps(taps)
        for i in range(len(c.channels)):
            name = f"conv{i + 1}"
            x = relu(tap(name, getattr(self, name)(x)))
            if c.pool:
                x = max_pool2d(x, 2)
        x = flatten(x)
        for i in range(len(c.hidden)):
            name = f"fc{i + 1}"
            x = relu(tap(name, getattr(self, name)(x)))
        return tap.result(getattr(self, f"fc{len(c.hidden) + 1}")(x))
