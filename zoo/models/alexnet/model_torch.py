"""AlexNet in PyTorch. Krizhevsky 2014, https://arxiv.org/abs/1404.5997; names from torchvision.

B images, H x W pixels in each, C channels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zoo.models.alexnet.config import Config
from zoo.nn.conv_torch import Conv2d
from zoo.nn.layers_torch import Linear
from zoo.nn.pool_torch import adaptive_avg_pool2d, flatten
from zoo.nn.taps import Taps


class AlexNet(nn.Module):
    """`dtype` is that of the computation, `param_dtype` of the weights."""

    def __init__(self, c: Config, **kw: Any) -> None:
        super().__init__()
        C = c.channels
        self.features = nn.Sequential(
            Conv2d(3, C[0], 11, stride=4, padding=2, **kw),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            Conv2d(C[0], C[1], 5, padding=2, **kw),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            Conv2d(C[1], C[2], 3, padding=1, **kw),
            nn.ReLU(),
            Conv2d(C[2], C[3], 3, padding=1, **kw),
            nn.ReLU(),
            Conv2d(C[3], C[4], 3, padding=1, **kw),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(c.dropout),
            Linear(C[4] * 6 * 6, c.hidden_size, **kw),
            nn.ReLU(),
            nn.Dropout(c.dropout),
            Linear(c.hidden_size, c.hidden_size, **kw),
            nn.ReLU(),
            Linear(c.hidden_size, c.num_classes, **kw),
        )

    def forward(self, x: Tensor, taps: bool = False) -> Any:
        """(B, 3, H, W) of 63 pixels or more -> logits (B, num_classes).

        `taps=True` adds {module path: what it gives}.
        """
        tap = Taps(taps)
        for i, layer in enumerate(self.features):
            x = tap(f"features.{i}", layer(x))
        x = flatten(tap("avgpool", adaptive_avg_pool2d(x, (6, 6))))
        for i, layer in enumerate(self.classifier):
            x = tap(f"classifier.{i}", layer(x))
        return tap.result(x)
