"""Pooling and flattening, as torch has them: (B, C, H, W)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, max_pool2d

__all__ = ["adaptive_avg_pool2d", "avg_pool2d", "flatten", "max_pool2d"]


def flatten(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C*H*W), columns channel-first."""
    return x.flatten(1)
