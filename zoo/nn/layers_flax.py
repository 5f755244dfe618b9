"""NNX layers with torch's meaning, under the names that their torch twins have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from zoo.nn.options_flax import Options

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),  # the frameworks' defaults differ
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class Embed(nnx.Embed):
    """nnx.Embed whose row `padding_idx` gets no gradient when it is looked up, as in torch."""

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        padding_idx: int | None = None,
        **kw: Unpack[Options],
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

    Flax's default epsilon is a tenth of torch's, and its fast variance loses digits where the
    mean is large.
    """

    def __init__(self, dim: int, eps: float, **kw: Unpack[Options]) -> None:
        super().__init__(dim, epsilon=eps, use_fast_variance=False, **kw)


class ReLU(nnx.Module):
    """max(x, 0), as a module for use in a Sequential."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.relu(x)


class Sequential(nnx.List[Any]):
    """Layers called one after another, under torch's paths: `0.kernel`, `1.kernel`.

    In nnx.Sequential the paths would be `layers.0.kernel`, `layers.1.kernel`.
    """

    def __init__(self, *layers: Callable[[Array], Array]) -> None:
        super().__init__(layers)

    def __call__(self, x: Array) -> Array:
        for layer in self:
            x = layer(x)
        return x
