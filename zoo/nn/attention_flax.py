"""Scaled dot-product attention (Vaswani 2017, section 3.2), and what decoding needs around it.

B sequences; T queries and S keys in each; E features, N heads of D = E / N.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from zoo.nn.options_flax import Options


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    dropout: Callable[[Array], Array] = lambda weights: weights,
    scale: float | None = None,
) -> Array:
    """(B, T, N, D), (B, S, N, D), (B, S, N, D) -> (B, T, N, D).

    `bias` is added to the logits and broadcasts to (B, N, T, S). `dropout` is applied to the
    weights. `scale` multiplies the logits; None: 1 / sqrt(D). Unlike in
    `jax.nn.dot_product_attention`, the softmax is in the query's dtype: float64 stays float64.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = jnp.einsum("btnd,bsnd->bnts", query, key) * scale
    if bias is not None:
        logits = logits + bias
    weights = dropout(jax.nn.softmax(logits, axis=-1))
    return jnp.einsum("bnts,bsnd->btnd", weights, value)


def mask_bias(mask: Array, dtype: DTypeLike) -> Array:
    """0 where `mask` is true, the most negative number of `dtype` elsewhere.

    Not -inf: a query that may attend to nothing then attends to everything equally, without NaN.
    """
    return jnp.where(mask.astype(bool), 0, jnp.finfo(dtype).min).astype(dtype)


class KeyValue(NamedTuple):
    """Keys and values, projected and split into heads; also what a decoder caches."""

    key: Array  # (B, S, N, D)
    value: Array  # (B, S, N, D)


def empty_cache(like: KeyValue, length: int) -> KeyValue:
    """Zeros for `length` positions, with the batch, heads and dtype of `like`."""
    B, _, N, D = like.key.shape
    return KeyValue(
        jnp.zeros((B, length, N, D), like.key.dtype), jnp.zeros((B, length, N, D), like.value.dtype)
    )


def write_cache(cache: KeyValue, new: KeyValue, position: ArrayLike) -> KeyValue:
    """A copy of `cache` with `new`, of T positions, written from `position` on."""
    put = jax.lax.dynamic_update_slice_in_dim
    return KeyValue(
        put(cache.key, new.key.astype(cache.key.dtype), position, 1),
        put(cache.value, new.value.astype(cache.value.dtype), position, 1),
    )


def causal_mask(queries: int, keys: int, position: ArrayLike = 0) -> Array:
    """(T, S) booleans: the query at `position` + i may attend to the keys 0 to `position` + i."""
    q = jnp.arange(queries)[:, None] + position
    return jnp.arange(keys)[None, :] <= q


class MultiheadAttention(nnx.Module):
    """torch.nn.MultiheadAttention, batch first, with its fused `in_proj` as three layers.

    Keys and values are projected by a call of their own, so that a decoder can cache them.
    """

    def __init__(
        self, dim: int, heads: int, dropout: float = 0.0, bias: bool = True, **kw: Unpack[Options]
    ) -> None:
        self.heads = heads
        self.query = nnx.Linear(dim, dim, use_bias=bias, **kw)
        self.key = nnx.Linear(dim, dim, use_bias=bias, **kw)
        self.value = nnx.Linear(dim, dim, use_bias=bias, **kw)
        self.out_proj = nnx.Linear(dim, dim, use_bias=bias, **kw)
        self.dropout = nnx.Dropout(dropout, rngs=kw["rngs"])

    def keys_values(self, x: Array) -> KeyValue:
        """x (B, S, E) -> the keys and values to attend to."""
        return KeyValue(self._heads(self.key(x)), self._heads(self.value(x)))

    def __call__(self, x: Array, attended: KeyValue, bias: Array | None = None) -> Array:
        """x (B, T, E) -> (B, T, E); `bias` broadcasts to (B, N, T, S)."""
        query = self._heads(self.query(x))
        bias = None if bias is None else bias.astype(query.dtype)
        out = dot_product_attention(query, *attended, bias, self.dropout)
        return self.out_proj(out.reshape(x.shape))

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.heads, -1)


def relative_bucket(table: np.ndarray, queries: Array, keys: Array, bidirectional: bool) -> Array:
    """Positions (T,) and (S,) -> buckets (T, S); `table` is `relative_positions.bucket_table`'s.

    Keys after the query are all in bucket 0, or, if `bidirectional`, in buckets of their own,
    which follow those of the keys before it.
    """
    buckets, last = jnp.asarray(table, jnp.int32), len(table) - 1
    distance = queries[:, None] - keys[None, :]
    if not bidirectional:
        return buckets[distance.clip(0, last)]
    after = (distance < 0) * (int(table[-1]) + 1)
    return buckets[jnp.abs(distance).clip(0, last)] + after
