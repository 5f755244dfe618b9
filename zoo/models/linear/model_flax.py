"""Linear maps in Flax NNX: the twin of model_torch.py, class by class.

B samples, D features in, E features out.
"""

from __future__ import annotations

from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import Array
from jax.typing import DTypeLike

from zoo.models.linear.config import Config
from zoo.nn.options_flax import Options


class LinearRegression(nnx.Module):
    """y = w * x + b, where w and b are one number each."""

    def __init__(
        self,
        c: Config,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.dtype = dtype
        self.w = nnx.Param(jnp.zeros(1, param_dtype))
        self.b = nnx.Param(jnp.zeros(1, param_dtype))

    def __call__(self, x: Array) -> Array:
        """(B, 1) -> (B, 1)."""
        x, w, b = promote_dtype((x, self.w[...], self.b[...]), dtype=self.dtype)
        return w * x + b


class LinearMap(nnx.Linear):
    """A linear layer that is the whole model: its tensors are `kernel` and `bias`, at the root."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__(c.in_features, c.out_features, **kw)

    def __call__(self, x: Array) -> Array:  # type: ignore[override]  # no out_sharding
        """(B, D) -> (B, E)."""
        return super().__call__(x)


def linear(c: Config, **kw: Unpack[Options]) -> LinearRegression | LinearMap:
    """The module for `c.form`."""
    return LinearRegression(c, **kw) if c.form == "scalar" else LinearMap(c, **kw)
