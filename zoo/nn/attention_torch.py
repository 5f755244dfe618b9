"""Scaled dot-product attention (Vaswani 2017, section 3.2), and what decoding needs around it.

B sequences; T queries and S keys in each; E features, N heads of D = E / N.
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.nn.layers_torch import Linear, promote
from zoo.nn.options_torch import Options


def dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """(B, T, N, D), (B, S, N, D), (B, S, N, D) -> (B, T, N, D).

    `bias` is added to the logits and broadcasts to (B, N, T, S). `dropout` is the probability of
    dropping a weight, 0 outside of training. `scale` multiplies the logits; None: 1 / sqrt(D).
    Second derivatives need torch's math backend
    (`torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`).
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=scale)
    return out.transpose(1, 2)


def mask_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `mask` is true, the most negative number of `dtype` elsewhere.

    Not -inf: a query that may attend to nothing then attends to everything equally, without NaN.
    """
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill(~mask.bool(), torch.finfo(dtype).min)


class KeyValue(NamedTuple):
    """Keys and values, projected and split into heads; also what a decoder caches."""

    key: Tensor  # (B, S, N, D)
    value: Tensor  # (B, S, N, D)


def empty_cache(like: KeyValue, length: int) -> KeyValue:
    """Zeros for `length` positions, with the batch, heads and dtype of `like`."""
    B, _, N, D = like.key.shape
    return KeyValue(like.key.new_zeros(B, length, N, D), like.value.new_zeros(B, length, N, D))


def write_cache(cache: KeyValue, new: KeyValue, position: int) -> KeyValue:
    """A copy of `cache` with `new`, of T positions, written from `position` on."""
    at = torch.arange(position, position + new.key.shape[1], device=new.key.device)
    return KeyValue(
        cache.key.index_copy(1, at, new.key.to(cache.key.dtype)),
        cache.value.index_copy(1, at, new.value.to(cache.value.dtype)),
    )


def causal_mask(
    queries: int, keys: int, position: int = 0, device: torch.device | None = None
) -> Tensor:
    """(T, S) booleans: the query at `position` + i may attend to the keys 0 to `position` + i."""
    q = torch.arange(queries, device=device)[:, None] + position
    return torch.arange(keys, device=device)[None, :] <= q


class MultiheadAttention(nn.Module):
    """torch.nn.MultiheadAttention, batch first, with its names and shapes.

    Keys and values are projected by a call of their own, so that a decoder can cache them.
    """

    def __init__(
        self, dim: int, heads: int, dropout: float = 0.0, bias: bool = True, **kw: Unpack[Options]
    ) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.dtype = kw.get("dtype")
        param_dtype = kw.get("param_dtype", torch.float32)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim, dtype=param_dtype))
        zeros = torch.zeros(3 * dim, dtype=param_dtype)
        self.in_proj_bias = nn.Parameter(zeros) if bias else None
        self.out_proj = Linear(dim, dim, bias, **kw)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def keys_values(self, x: Tensor) -> KeyValue:
        """x (B, S, E) -> the keys and values to attend to."""
        E = x.shape[-1]
        key, value = self._project(x, E, 3 * E).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return KeyValue(key, value)

    def forward(self, x: Tensor, attended: KeyValue, bias: Tensor | None = None) -> Tensor:
        """x (B, T, E) -> (B, T, E); `bias` broadcasts to (B, N, T, S)."""
        query = self._project(x, 0, x.shape[-1]).unflatten(-1, (self.heads, -1))
        bias = None if bias is None else bias.to(query.dtype)
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(dot_product_attention(query, *attended, bias, dropout).flatten(2))

    def _project(self, x: Tensor, start: int, stop: int) -> Tensor:
        """x by the rows `start` to `stop` of the fused projection: queries, keys, values."""
        weight = self.in_proj_weight[start:stop]
        if self.in_proj_bias is None:
            return F.linear(*promote(self.dtype, x, weight))
        return F.linear(*promote(self.dtype, x, weight, self.in_proj_bias[start:stop]))


def relative_bucket(
    table: np.ndarray, queries: Tensor, keys: Tensor, bidirectional: bool
) -> Tensor:
    """Positions (T,) and (S,) -> buckets (T, S); `table` is `relative_positions.bucket_table`'s.

    Keys after the query are all in bucket 0, or, if `bidirectional`, in buckets of their own,
    which follow those of the keys before it.
    """
    buckets, last = torch.tensor(table.tolist(), device=queries.device), len(table) - 1
    distance = queries[:, None] - keys[None, :]
    if not bidirectional:
        return buckets[distance.clamp(0, last)]
    after = (distance < 0) * (int(table[-1]) + 1)
    return buckets[distance.abs().clamp(0, last)] + after
