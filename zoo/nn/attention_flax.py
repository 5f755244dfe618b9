"""Scaled dot-product attention (Vaswani 2017, section 3.2.1)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    dropout: Callable[[Array], Array] = lambda weights: weights,
) -> Array:
    """(B, T, N, D), (B, S, N, D), (B, S, N, D) -> (B, T, N, D), N heads of D each.

    `bias` is added to the logits and broadcasts to (B, N, T, S). `dropout` is applied to the
    weights. Everything is computed in the dtype of the query: `jax.nn.dot_product_attention` takes
    its softmax in float32, even for float64.
    """
    logits = jnp.einsum("btnd,bsnd->bnts", query, key) * query.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias
    weights = dropout(jax.nn.softmax(logits, axis=-1))
    return jnp.einsum("bnts,bsnd->btnd", weights, value)


def mask_bias(mask: Array, dtype: DTypeLike) -> Array:
    """0 where `mask` is true, the most negative number of `dtype` elsewhere.

    Finite, so that a row in which nothing may be attended to stays finite: it attends to all alike.
    """
    return jnp.where(mask.astype(bool), 0, jnp.finfo(dtype).min).astype(dtype)
