"""The documents' small convolutional classifiers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from upstream import Document, Upstream
from zoo.models.convnet import MODEL


class Pooled(nn.Module):
    """All the documents' classes: two convolutions or one, two linear layers or three."""

    def __init__(self, conv1: nn.Module, conv2: nn.Module | None, *widths: int) -> None:
        super().__init__()
        self.conv1 = conv1
        if conv2 is not None:
            self.conv2 = conv2
        self.fc1 = nn.Linear(widths[0], widths[1])
        self.fc2 = nn.Linear(widths[1], widths[2])
        if len(widths) > 3:
            self.fc3 = nn.Linear(widths[2], widths[3])

    def features(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2, 2)
        return F.max_pool2d(F.relu(self.conv2(x)), 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)
        x = F.relu(self.fc1(x.view(x.shape[0], -1)))
        return self.fc3(F.relu(self.fc2(x))) if hasattr(self, "fc3") else self.fc2(x)


class Wide(Pooled):
    def features(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(F.relu(self.conv1(x)), 2, 2)


class Unpooled(Pooled):
    def features(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))))


CLASSES: dict[str, Callable[[], nn.Module]] = {
    "mnist_cnn": lambda: Pooled(nn.Conv2d(1, 10, 5), nn.Conv2d(10, 20, 5), 320, 10, 10),
    "mnist_cnn_wide": lambda: Wide(nn.Conv2d(1, 32, 3, 2, 1), None, 1568, 128, 10),
    "image_cnn": lambda: Pooled(
        nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1), 4096, 128, 10
    ),
    "cifar_net": lambda: Pooled(nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5), 400, 120, 84, 10),
    "jax_cnn": lambda: Pooled(
        nn.Conv2d(1, 32, 3, padding="same"), nn.Conv2d(32, 64, 3, padding="same"), 3136, 128, 10
    ),
    "flax_cnn": lambda: Unpooled(
        nn.Conv2d(3, 32, 3, padding="same"), nn.Conv2d(32, 64, 3, padding="same"), 65536, 128, 10
    ),
}

UPSTREAM = Upstream(documents={n: Document(MODEL.presets[n], make) for n, make in CLASSES.items()})
