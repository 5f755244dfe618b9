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
        *,
        dtype: torch.dtype | None = None,
        param_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(num_features, eps, momentum, dtype=param_dtype)
        self.dtype = dtype

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        given = self.dtype or torch.promote_types(input.dtype, self.weight.dtype)
        wide = torch.promote_types(given, torch.float32)
        mean, var = self.running_mean, self.running_var
        assert mean is not None
        assert var is not None
        # If the dtype is the same, these are the buffers themselves, updated in place below.
        wide_mean, wide_var = mean.to(wide), var.to(wide)
        y = F.batch_norm(
            input.to(wide),
            wide_mean,
            wide_var,
            self.weight.to(wide),
            self.bias.to(wide),
            self.training,
            self.momentum or 0.0,
            self.eps,
        )
        if self.training:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            if mean.dtype != wide:
                mean.copy_(wide_mean)
                var.copy_(wide_var)
        return y.to(given)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """nn.BatchNorm1d with `dtype` and `param_dtype`: (B, C) or (B, C, T)."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """nn.BatchNorm2d with `dtype` and `param_dtype`: (B, C, H, W)."""
