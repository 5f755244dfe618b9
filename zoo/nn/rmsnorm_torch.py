"""Root mean square layer norm (Zhang and Sennrich 2019), as T5 has it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.nn.layers_torch import promote


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, with `dtype` and `param_dtype`.

    The mean square is in float32 or wider; upstream's T5 always takes it in float32. `eps` None is
    the machine epsilon of what it is taken in, torch.nn.RMSNorm's default.
    """

    def __init__(
        self,
        dim: int,
        eps: float | None,
        *,
        dtype: torch.dtype | None = None,
        param_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.dtype = dtype
        self.weight = nn.Parameter(torch.ones(dim, dtype=param_dtype))

    def forward(self, input: Tensor) -> Tensor:
        x, weight = promote(self.dtype, input, self.weight)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        eps = torch.finfo(wide.dtype).eps if self.eps is None else self.eps
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (x * (scale * weight)).to(x.dtype)
