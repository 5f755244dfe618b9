"""Scaled dot-product attention, and the forms that a graph has for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.porting.rules import rule
from convert.porting.rules.promote import cast, opmath
from convert.porting.rules.random_draws import dropped

Rng = Callable[[], Any]


def _attention(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    dropout_p: float,
    causal: bool,
    scale: float | None,
    grouped: bool,
    rng: Rng,
) -> tuple[Any, Any]:
    """q (..., L, E), k (..., S, E), v (..., S, V) -> (..., L, V) and log of the sums (..., L).
    A row that may see nothing gives 0. Grouped: each head of k and v serves several of q."""
    if grouped and q.shape[-3] != k.shape[-3]:
        k = jnp.repeat(k, q.shape[-3] // k.shape[-3], axis=-3)
    if grouped and q.shape[-3] != v.shape[-3]:
        v = jnp.repeat(v, q.shape[-3] // v.shape[-3], axis=-3)
    dtype = opmath(q.dtype)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = cast(jnp.einsum("...le,...se->...ls", q, k), dtype) * scale
    if causal:
        seen = np.tril(np.ones(scores.shape[-2:], bool))
        scores = jnp.where(seen, scores, -jnp.inf)
    if mask is not None:
        masked = jnp.where(mask, scores, -jnp.inf) if mask.dtype == np.bool_ else scores + mask
        scores = cast(masked, dtype)
    top = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf)
    top = jnp.where(jnp.isneginf(top), 0, top)
    raised = jnp.exp(scores - top)
    total = jnp.sum(raised, axis=-1, keepdims=True)
    weights = cast(raised / jnp.where(total == 0, 1, total), q.dtype)
    if dropout_p:
        weights, _ = dropped(weights, dropout_p, rng)
    y = jnp.einsum("...ls,...sv->...lv", weights, v)
    return y, (jnp.log(total) + top)[..., 0]


@rule("aten.scaled_dot_product_attention.default", random=True)
def scaled_dot_product_attention(
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    rng: Rng,
) -> Any:
    return _attention(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa, rng)[0]


@rule("aten._scaled_dot_product_flash_attention_for_cpu.default", random=True)
def flash_attention_for_cpu(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Any = None,
    scale: float | None = None,
    rng: Rng,
) -> tuple[Any, Any]:
    return _attention(q, k, v, attn_mask, dropout_p, is_causal, scale, True, rng)
