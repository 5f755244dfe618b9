"""Sinusoidal positions (Vaswani 2017, section 3.5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoids(positions: Tensor, limit: int, dim: int, dtype: torch.dtype) -> Tensor:
    """positions (T,), all below `limit` -> (T, dim), computed in float64; `dim` is even.

    Columns 2i and 2i + 1 at position p are sin and cos of p / 10000^(2i / dim). `limit` is
    for the Flax twin, which makes a table; here it is not used.
    """
    even = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device)
    angle = positions.double()[:, None] * torch.exp(even * (-math.log(10000.0) / dim))
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1).to(dtype)
