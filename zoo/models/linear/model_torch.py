"""Linear maps in PyTorch.

B samples, D features in, E features out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.models.linear.config import Config
from zoo.nn.layers_torch import Linear, promote
from zoo.nn.taps import Taps


class LinearRegression(nn.Module):
    """y = w * x + b with one number each."""

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

    def forward(self, x: Tensor, taps: bool = False) -> Any:
        """(B, 1) -> (B, 1)."""
        tap = Taps(taps)
        x, w, b = promote(self.dtype, x, self.w, self.b)
        return tap.result(tap("product", w * x) + b)


class LinearMap(Linear):
    """A linear layer that is the whole model, so that its parameters are at the root."""

    def __init__(self, c: Config, **kw: Any) -> None:
        super().__init__(c.in_features, c.out_features, **kw)

    def forward(self, x: Tensor, taps: bool = False) -> Any:
        """(B, D) -> (B, E)."""
        tap = Taps(taps)
        return tap.result(tap("linear", super().forward(x)))


def linear(c: Config, **kw: Any) -> nn.Module:
    """The module for `c.form`. `dtype` is that of the computation, `param_dtype` of the weights."""
    return LinearRegression(c, **kw) if c.form == "scalar" else LinearMap(c, **kw)
