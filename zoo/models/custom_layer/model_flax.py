"""A custom layer and a linear one in Flax NNX: the twin of model_torch.py, class by class.

B samples, D features in, E features out.
"""

from __future__ import annotations

from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import Array
from jax.typing import DTypeLike

from zoo.models.custom_layer.config import Config
from zoo.nn import layers_flax
from zoo.nn.options_flax import Options


class Identity(nnx.Module):
    """A layer without parameters, of which a checkpoint has nothing: (B, D) -> (B, D)."""

    def __call__(self, x: Array) -> Array:
        return x


class Scale(nnx.Module):
    """A layer with a parameter, a factor for each feature: (B, D) -> (B, D)."""

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


class Sequential(layers_flax.Sequential):
    """Layers `0` (the custom one), `1` (linear) and `2` (ReLU): (B, D) -> (B, E)."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        custom = Scale(c.in_features, **kw) if c.layer == "scale" else Identity()
        linear = nnx.Linear(c.in_features, c.out_features, **kw)
        super().__init__(custom, linear, layers_flax.ReLU())
