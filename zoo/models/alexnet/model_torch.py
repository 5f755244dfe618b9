"""AlexNet in PyTorch. Krizhevsky 2014, https://arxiv.org/abs/1404.5997; names and sizes from
torchvision's models/alexnet.py.

B images, H x W pixels in each, C channels: (B, C, H, W).
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn

from zoo.models.alexnet.config import Config
from zoo.nn.conv_torch import Conv2d
from zoo.nn.layers_torch import Linear
from zoo.nn.options_torch import Options


class AlexNet(nn.Module):
    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        C1, C2, C3, C4, C5 = c.channels
        self.features = nn.Sequential(
            Conv2d(3, C1, 11, stride=4, padding=2, **kw),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
            Conv2d(C1, C2, 5, padding=2, **kw),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
            Conv2d(C2, C3, 3, padding=1, **kw),
            nn.ReLU(),
            Conv2d(C3, C4, 3, padding=1, **kw),
            nn.ReLU(),
            Conv2d(C4, C5, 3, padding=1, **kw),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        self.classifier = nn.Sequential(
            nn.Dropout(c.dropout),
            Linear(C5 * 6 * 6, c.hidden_size, **kw),
            nn.ReLU(),
            nn.Dropout(c.dropout),
            Linear(c.hidden_size, c.hidden_size, **kw),
            nn.ReLU(),
            Linear(c.hidden_size, c.num_classes, **kw),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W), 63 pixels or more a side -> logits (B, num_classes)."""
        x = self.features(x)
        x = self.avgpool(x)  # (B, C5, 6, 6)
        return self.classifier(x.flatten(1))
