"""Linear maps in Flax NNX: the twin of model_torch.py, class by class.

B samples, D features in, E features out.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import Array
from jax.typing import DTypeLike

from zoo.models.linear.config import Config
from zoo.nn.taps import Taps


class LinearRegression(nnx.Module):
    """y = w * x + b with one number each."""

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

    def __call__(self, x: Array, taps: bool = False) -> Any:
        """(B, 1) -> (B, 1)."""
        tap = Taps(taps)
        x, w, b = promote_dtype((x, self.w[...], self.b[...]), dtype=self.dtype)
        return tap.result(tap("product", w * x) + b)


class LinearMap(nnx.Linear):
    """A linear layer that is the whole model, so that its parameters are at the root."""

    def __init__(self, c: Config, **kw: Any) -> None:
        super().__init__(c.in_features, c.out_features, **kw)

    def __call__(self, x: Array, taps: bool = False) -> Any:
        """(B, D) -> (B, E)."""
        tap = Taps(taps)
        return tap.result(tap("linear", super().__call__(x)))


def linear(c: Config, **kw: Any) -> nnx.Module:
    """The module for `c.form`. `dtype` is that of the computation, `param_dtype` of the weights;
    `rngs` is required, as everywhere in NNX."""
    return LinearRegression(c, **kw) if c.form == "scalar" else LinearMap(c, **kw)
