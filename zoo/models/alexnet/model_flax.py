"""AlexNet in Flax NNX: the twin of model_torch.py, layer by layer.

Krizhevsky 2014, https://arxiv.org/abs/1404.5997; names and sizes from torchvision's
models/alexnet.py.

B images, H x W pixels in each, C channels, which come last: (B, H, W, C).
"""

from __future__ import annotations

from typing import Unpack

from flax import nnx
from jax import Array

from zoo.models.alexnet.config import Config
from zoo.nn.conv_flax import Conv2d
from zoo.nn.layers_flax import ReLU, Sequential
from zoo.nn.options_flax import Options
from zoo.nn.pool_flax import AdaptiveAvgPool2d, MaxPool2d, flatten


class AlexNet(nnx.Module):
    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        C1, C2, C3, C4, C5 = c.channels
        self.features = Sequential(
            Conv2d(3, C1, 11, stride=4, padding=2, **kw),
            ReLU(),
            MaxPool2d(3, stride=2),
            Conv2d(C1, C2, 5, padding=2, **kw),
            ReLU(),
            MaxPool2d(3, stride=2),
            Conv2d(C2, C3, 3, padding=1, **kw),
            ReLU(),
            Conv2d(C3, C4, 3, padding=1, **kw),
            ReLU(),
            Conv2d(C4, C5, 3, padding=1, **kw),
            ReLU(),
            MaxPool2d(3, stride=2),
        )
        self.avgpool = AdaptiveAvgPool2d(6)
        self.classifier = Sequential(
            nnx.Dropout(c.dropout, rngs=kw["rngs"]),
            nnx.Linear(C5 * 6 * 6, c.hidden_size, **kw),
            ReLU(),
            nnx.Dropout(c.dropout, rngs=kw["rngs"]),
            nnx.Linear(c.hidden_size, c.hidden_size, **kw),
            ReLU(),
            nnx.Linear(c.hidden_size, c.num_classes, **kw),
        )

    def __call__(self, x: Array) -> Array:
        """(B, H, W, 3), 63 pixels or more a side -> logits (B, num_classes)."""
        x = self.features(x)
        x = self.avgpool(x)  # (B, 6, 6, C5)
        return self.classifier(flatten(x))
