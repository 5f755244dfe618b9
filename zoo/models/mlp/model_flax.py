"""A multilayer perceptron in Flax NNX: the twin of model_torch.py.

B samples; the widths of the layers are `Config.sizes`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from zoo.models.mlp.config import Config
from zoo.nn.options_flax import Options

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "none": lambda x: x,
}


class MLP(nnx.Module):
    """Linear layers named `Config.names`, an activation after each."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.config = c
        for name, (n_in, n_out) in zip(c.names, pairwise(c.sizes), strict=True):
            setattr(self, name, nnx.Linear(n_in, n_out, **kw))

    def __call__(self, x: Array) -> Array:
        """(B, sizes[0]) -> (B, sizes[-1])."""
        c = self.config
        for name in c.names[:-1]:
            x = ACTIVATIONS[c.activation](getattr(self, name)(x))
        x = getattr(self, c.names[-1])(x)
        return ACTIVATIONS[c.output_activation](x)
