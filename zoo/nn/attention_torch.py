"""Scaled dot-product attention (Vaswani 2017, section 3.2.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """(B, T, N, D), (B, S, N, D), (B, S, N, D) -> (B, T, N, D), N heads of D each.

    `bias` is added to the logits and broadcasts to (B, N, T, S). `dropout` is the probability of
    dropping a weight, 0 outside of training. Second derivatives need torch's math backend
    (`torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`).
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, bias, dropout).transpose(1, 2)


def mask_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `mask` is true, the most negative number of `dtype` elsewhere.

    Finite, so that a row in which nothing may be attended to stays finite: it attends to all alike.
    """
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill(~mask.bool(), torch.finfo(dtype).min)
