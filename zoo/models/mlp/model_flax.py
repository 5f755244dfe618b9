"""A multilayer perceptron in Flax NNX: the twin of model_torch.py.

B samples; the widths of the layers are `Config.sizes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from zoo.models.mlp.config import Config
from zoo.nn.taps import Taps

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "none": lambda x: x,
}


class MLP(nnx.Module):
    """`dtype` is that of the computation, `param_dtype` of the weights; `rngs` is required, as
    everywhere in NNX."""

    def __init__(self, c: Config, **kw: Any) -> None:
        self.config = c
        for name, n_in, n_out in zip(c.names, c.sizes[:-1], c.sizes[1:], strict=True):
            setattr(self, name, nnx.Linear(n_in, n_out, **kw))

    def __call__(self, x: Array, taps: bool = False) -> Any:
        """(B, sizes[0]) -> (B, sizes[-1]); `taps=True` adds {layer: what it gives}."""
        c, tap = self.config, Taps(taps)
        for name in c.names:
            activation = c.output_activation if name == c.names[-1] else c.activation
            x = ACTIVATIONS[activation](tap(name, getattr(self, name)(x)))
        return tap.result(x)
