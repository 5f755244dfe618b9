"""torch's MultiheadAttention with torch's arguments: masks, weights, axes.

B sequences; T queries and S keys in each; E features, N heads of E / N. Blocks that decode, and
cache what they attend to, have `attention_flax.MultiheadAttention`.
"""

from __future__ import annotations

from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from zoo.nn.options_flax import Options


class MultiheadAttention(nnx.Module):
    """torch.nn.MultiheadAttention, whose fused `in_proj` is `query`, `key` and `value`.

    `kdim` and `vdim` are the features of keys and values; None: as many as queries have.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        **kw: Unpack[Options],
    ) -> None:
        self.num_heads = num_heads
        self.batch_first = batch_first
        self.query = nnx.Linear(embed_dim, embed_dim, use_bias=bias, **kw)
        self.key = nnx.Linear(kdim or embed_dim, embed_dim, use_bias=bias, **kw)
        self.value = nnx.Linear(vdim or embed_dim, embed_dim, use_bias=bias, **kw)
        self.out_proj = nnx.Linear(embed_dim, embed_dim, use_bias=bias, **kw)
        self.dropout = nnx.Dropout(dropout, rngs=kw["rngs"])

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        key_padding_mask: Array | None = None,
        need_weights: bool = True,
        attn_mask: Array | None = None,
        average_attn_weights: bool = True,
    ) -> tuple[Array, Array | None]:
        """query (T, B, E), key and value (S, B, E) -> (T, B, E), and the weights or None.

        With `batch_first`, B comes first in each. `key_padding_mask` (B, S) and `attn_mask`, (T, S)
        or (B*N, T, S), are true where nothing is attended to, or added to the logits. Weights are
        (B, T, S), the mean of all heads, or (B, N, T, S).
        """
        if not self.batch_first:
            query, key, value = (x.swapaxes(0, 1) for x in (query, key, value))
        q, k, v = map(self._heads, (self.query(query), self.key(key), self.value(value)))
        logits = jnp.einsum("btnd,bsnd->bnts", q * q.shape[-1] ** -0.5, k)
        if attn_mask is not None:
            each_head = attn_mask.ndim == 3
            logits = _masked(logits, attn_mask.reshape(logits.shape) if each_head else attn_mask)
        if key_padding_mask is not None:
            logits = _masked(logits, key_padding_mask[:, None, None, :])
        weights = self.dropout(jax.nn.softmax(logits, axis=-1))
        attended = jnp.einsum("bnts,bsnd->btnd", weights, v)
        output = self.out_proj(attended.reshape(query.shape))
        output = output if self.batch_first else output.swapaxes(0, 1)
        if not need_weights:
            return output, None
        return output, weights.mean(1) if average_attn_weights else weights

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)


def _masked(logits: Array, mask: Array) -> Array:
    return jnp.where(mask, -jnp.inf, logits) if mask.dtype == bool else logits + mask
