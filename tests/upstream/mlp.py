"""The documents' multilayer perceptrons."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from upstream import Document, Upstream
from zoo.models.mlp import MODEL


class Two(nn.Module):
    """mlp_10_20_10, mlp_2_3_1 and robot."""

    def __init__(self, a: int, b: int, c: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(a, b)
        self.fc2 = nn.Linear(b, c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.relu(self.fc1(x)))


class Three(nn.Module):
    """mlp_10_20_10_1 and recommendation; with sigmoids sigmoid_mlp."""

    def __init__(self, a: int, b: int, c: int, d: int, sigmoid: bool = False) -> None:
        super().__init__()
        self.sigmoid = sigmoid
        self.fc1 = nn.Linear(a, b)
        self.fc2 = nn.Linear(b, c)
        self.fc3 = nn.Linear(c, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.sigmoid:
            x = torch.sigmoid(self.fc2(torch.sigmoid(self.fc1(x))))
            return torch.sigmoid(self.fc3(x))
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


CLASSES: dict[str, Callable[[], nn.Module]] = {
    "mlp_10_20_10": lambda: Two(10, 20, 10),
    "mlp_10_20_10_1": lambda: Three(10, 20, 10, 1),
    "mlp_2_3_1": lambda: Two(2, 3, 1),
    "binary_mlp": lambda: nn.Sequential(
        nn.Linear(10, 100), nn.ReLU(), nn.Linear(100, 10), nn.ReLU(), nn.Linear(10, 1), nn.Sigmoid()
    ),
    "sigmoid_mlp": lambda: Three(10, 100, 10, 1, sigmoid=True),
    "recommendation": lambda: Three(10, 10, 10, 10),
    "robot": lambda: Two(10, 10, 10),
}

UPSTREAM = Upstream(documents={n: Document(MODEL.presets[n], make) for n, make in CLASSES.items()})
