"""A linear layer behind a layer of one's own, in Flax NNX: the twin of model_torch.py.

B samples, D features in, E features out.
"""

from __future__ import annotations

from typing import Any, Unpack

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import Array
from jax.typing import DTypeLike

from zoo.models.custom_layer.config import Config
from zoo.nn.layers_flax import ReLU
from zoo.nn.options_flax import Options


class Identity(nnx.Module):
    """A layer without parameters: nothing of it is in a checkpoint."""

    def __call__(self, x: Array) -> Array:
        return x


class Scale(nnx.Module):
    """A layer with a parameter: every feature times its own factor."""

    def __init__(
        self,
        features: int,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.dtype = dtype
        self.factor = nnx.Param(jnp.ones(features, param_dtype))

    def __call__(self, x: Array) -> Array:
        x, factor = promote_dtype((x, self.factor[...]), dtype=self.dtype)
        return x * factor


class Sequential(nnx.List[Any]):
    """Layers `0` (one's own), `1` (linear) and `2` (ReLU)."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        own = Scale(c.in_features, **kw) if c.layer == "scale" else Identity()
        super().__init__([own, nnx.Linear(c.in_features, c.out_features, **kw), ReLU()])

    def __call__(self, x: Array) -> Array:
        """(B, D) -> (B, E)."""
        for layer in self:
            x = layer(x)
        return x
