"""A linear layer behind a layer of one's own, in PyTorch.

B samples, D features in, E features out.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from zoo.models.custom_layer.config import Config
from zoo.nn.layers_torch import Linear, promote
from zoo.nn.options_torch import Options


class Identity(nn.Module):
    """A layer without parameters: nothing of it is in a checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Scale(nn.Module):
    """A layer with a parameter: every feature times its own factor."""

    def __init__(
        self,
        features: int,
        *,
        dtype: torch.dtype | None = None,
        param_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.factor = nn.Parameter(torch.ones(features, dtype=param_dtype))

    def forward(self, x: Tensor) -> Tensor:
        x, factor = promote(self.dtype, x, self.factor)
        return x * factor


class Sequential(nn.Sequential):
    """Layers `0` (one's own), `1` (linear) and `2` (ReLU)."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        own = Scale(c.in_features, **kw) if c.layer == "scale" else Identity()
        super().__init__(own, Linear(c.in_features, c.out_features, **kw), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, E)."""
        for layer in self:
            x = layer(x)
        return x
