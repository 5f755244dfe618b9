"""The document's layer of the user's own before a linear layer."""

from __future__ import annotations

import torch
from torch import nn

from upstream import Document, Upstream
from zoo.models.custom_layer import MODEL


class MyLayer(nn.Module):
    """A user's own, without parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


UPSTREAM = Upstream(
    documents={
        "custom_layer": Document(
            MODEL.presets["custom_layer"],
            lambda: nn.Sequential(MyLayer(), nn.Linear(10, 10), nn.ReLU()),
        )
    }
)
