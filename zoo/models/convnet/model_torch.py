"""A small convolutional classifier in PyTorch. LeCun 1998, with ReLU and maximum pools.

B images, H x W pixels in each, C channels: (B, C, H, W).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Unpack

from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

from zoo.models.convnet.config import Config
from zoo.nn.conv_torch import Conv2d
from zoo.nn.layers_torch import Linear
from zoo.nn.options_torch import Options


class ConvNet(nn.Module):
    """Convolutions `conv1`, `conv2`, ..., then linear layers `fc1`, `fc2`, ..."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.config = c
        for i, (n_in, n_out) in enumerate(pairwise((c.in_channels, *c.channels)), 1):
            conv = Conv2d(n_in, n_out, c.kernel_size, c.stride, c.padding, **kw)
            setattr(self, f"conv{i}", conv)
        flat = c.channels[-1] * c.side**2
        for i, (n_in, n_out) in enumerate(pairwise((flat, *c.hidden, c.num_classes)), 1):
            setattr(self, f"fc{i}", Linear(n_in, n_out, **kw))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, num_classes)."""
        c = self.config
        for i in range(1, len(c.channels) + 1):
            x = relu(getattr(self, f"conv{i}")(x))
            if c.pool:
                x = max_pool2d(x, 2)
        x = x.flatten(1)  # (B, C * H * W)
        for i in range(1, len(c.hidden) + 1):
            x = relu(getattr(self, f"fc{i}")(x))
        return getattr(self, f"fc{len(c.hidden) + 1}")(x)
