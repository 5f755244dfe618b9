"""A custom layer and a linear one in PyTorch.

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
    """A layer without parameters, of which a checkpoint has nothing: (B, D) -> (B, D)."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Scale(nn.Module):
    """A layer with a parameter, a factor for each feature: (B, D) -> (B, D)."""

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
    """Layers `0` (the custom one), `1` (linear) and `2` (ReLU): (B, D) -> (B, E)."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        custom = Scale(c.in_features, **kw) if c.layer == "scale" else Identity()
        linear = Linear(c.in_features, c.out_features, **kw)
        super().__init__(custom, linear, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)  # which calls it `input`; both twins say `x`
