"""Linear maps in PyTorch.

B samples, D features in, E features out.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from zoo.models.linear.config import Config
from zoo.nn.layers_torch import Linear, promote
from zoo.nn.options_torch import Options


class LinearRegression(nn.Module):
    """y = w * x + b, where w and b are one number each."""

    def __init__(
        self,
        c: Config,
        *,
        dtype: torch.dtype | None = None,
        param_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.w = nn.Parameter(torch.zeros(1, dtype=param_dtype))
        self.b = nn.Parameter(torch.zeros(1, dtype=param_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1) -> (B, 1)."""
        x, w, b = promote(self.dtype, x, self.w, self.b)
        return w * x + b


class LinearMap(Linear):
    """A linear layer that is the whole model: its tensors are `weight` and `bias`, at the root."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__(c.in_features, c.out_features, **kw)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, E)."""
        return super().forward(x)


def linear(c: Config, **kw: Unpack[Options]) -> LinearRegression | LinearMap:
    """The module for `c.form`."""
    return LinearRegression(c, **kw) if c.form == "scalar" else LinearMap(c, **kw)
