"""NNX layers with torch's meaning, under the names that their torch twins have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),  # both frameworks' defaults differ
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class Embed(nnx.Embed):
    """nnx.Embed whose row `padding_idx` gets no gradient from being looked up, as in torch."""

    def __init__(
        self, num_embeddings: int, features: int, *, padding_idx: int | None = None, **kw: Any
    ) -> None:
        super().__init__(num_embeddings, features, **kw)
        self.padding_idx = padding_idx

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        x = super().__call__(inputs, out_sharding)
        if self.padding_idx is None:
            return x
        return jnp.where((inputs == self.padding_idx)[..., None], jax.lax.stop_gradient(x), x)


class LayerNorm(nnx.LayerNorm):
    """nnx.LayerNorm over the last axis as torch computes it; `eps` has no default.

    Flax's own default epsilon is ten times torch's, and its fast variance loses digits wherever
    the mean is large.
    """

    def __init__(self, dim: int, eps: float, **kw: Any) -> None:
        super().__init__(dim, epsilon=eps, use_fast_variance=False, **kw)
