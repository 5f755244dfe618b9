"""torch BatchNorm with NNX's `dtype` and `param_dtype`, as in `zoo.nn.layers_torch`.

It computes in float32 or wider and returns `dtype`: in 16 bits, running statistics would not move.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        dtype: torch.dtype | None = None,
        param_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, dtype=param_dtype
        )
        self.dtype = dtype

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        given = self.dtype or input.dtype
        if self.dtype is None and self.affine:
            given = torch.promote_types(input.dtype, self.weight.dtype)
        wide = torch.promote_types(given, torch.float32)
        # Of the same dtype, these are the tensors themselves: the statistics change in place below.
        kept = (self.running_mean, self.running_var)
        mean, var, weight, bias = (
            t if t is None else t.to(wide) for t in (*kept, self.weight, self.bias)
        )
        batch = self.training or mean is None
        y = F.batch_norm(
            input.to(wide), mean, var, weight, bias, batch, self.momentum or 0.0, self.eps
        )
        if self.training and mean is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            for statistic, moved in zip(kept, (mean, var), strict=True):
                if statistic is not None and moved is not None and statistic is not moved:
                    statistic.copy_(moved)
        return y.to(given)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """nn.BatchNorm1d with `dtype` and `param_dtype`: (B, C) or (B, C, T)."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """nn.BatchNorm2d with `dtype` and `param_dtype`: (B, C, H, W)."""
