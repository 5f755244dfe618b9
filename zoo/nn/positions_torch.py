"""Sinusoidal positions (Vaswani 2017, section 3.5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoids(
    length: int, dim: int, dtype: torch.dtype, device: torch.device | None = None
) -> Tensor:
    """(length, dim): sin in the even columns, cos in the odd, computed in float64; `dim` is even.

    Column 2i and 2i + 1 at position p are sin and cos of p / 10000^(2i / dim).
    """
    even = torch.arange(0, dim, 2, dtype=torch.float64, device=device)
    position = torch.arange(length, dtype=torch.float64, device=device)
    angle = position[:, None] * torch.exp(even * (-math.log(10000.0) / dim))
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1).to(dtype)
