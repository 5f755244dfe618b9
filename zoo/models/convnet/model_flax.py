"""A small convolutional classifier in Flax NNX: the twin of model_torch.py.

B images, H x W pixels in each, C channels, which come last: (B, H, W, C).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Unpack

from flax import nnx
from jax import Array
from jax.nn import relu

from zoo.models.convnet.config import Config
from zoo.nn.conv_flax import Conv2d
from zoo.nn.options_flax import Options
from zoo.nn.pool_flax import flatten, max_pool2d


class ConvNet(nnx.Module):
    """Convolutions `conv1`, `conv2`, ..., then linear layers `fc1`, `fc2`, ..."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.config = c
        for i, (n_in, n_out) in enumerate(pairwise((c.in_channels, *c.channels)), 1):
            conv = Conv2d(n_in, n_out, c.kernel_size, c.stride, c.padding, **kw)
            setattr(self, f"conv{i}", conv)
        flat = c.channels[-1] * c.side**2
        for i, (n_in, n_out) in enumerate(pairwise((flat, *c.hidden, c.num_classes)), 1):
            setattr(self, f"fc{i}", nnx.Linear(n_in, n_out, **kw))

    def __call__(self, x: Array) -> Array:
        """(B, H, W, C) -> logits (B, num_classes)."""
        c = self.config
        for i in range(1, len(c.channels) + 1):
            x = relu(getattr(self, f"conv{i}")(x))
            if c.pool:
                x = max_pool2d(x, 2)
        x = flatten(x)  # (B, C * H * W), the channels first as in torch
        for i in range(1, len(c.hidden) + 1):
            x = relu(getattr(self, f"fc{i}")(x))
        return getattr(self, f"fc{len(c.hidden) + 1}")(x)
