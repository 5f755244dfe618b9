"""The documents' linear regression, and a bare linear layer."""

from __future__ import annotations

import torch
from torch import nn

from upstream import Document, Upstream
from zoo.models.linear import MODEL


class LinearRegression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(1))
        self.b = nn.Parameter(torch.randn(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w * x + self.b


UPSTREAM = Upstream(
    documents={
        "linear_regression": Document(MODEL.presets["linear_regression"], LinearRegression),
        "linear_3x3": Document(MODEL.presets["linear_3x3"], lambda: nn.Linear(3, 3)),
    }
)
