"""DQN in Flax NNX: the twin of model_torch.py, class by class.

Mnih 2015, https://doi.org/10.1038/nature14236; names from stable-baselines3's dqn/policies.py.

B observations, A actions; images are (B, H, W, C), vectors (B, size).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from jax import Array

from zoo.models.dqn.config import CONVOLUTIONS, Config, Output
from zoo.nn.conv_flax import Conv2d
from zoo.nn.layers_flax import ReLU, Sequential
from zoo.nn.options_flax import Options
from zoo.nn.pool_flax import Flatten


class NatureCNN(nnx.Module):
    """Three convolutions and a linear layer, a ReLU after each (Mnih 2015, Methods)."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        layers: list[Conv2d | ReLU] = []
        n_in = c.obs_shape[0]
        for n_out, kernel, stride in CONVOLUTIONS:
            layers += [Conv2d(n_in, n_out, kernel, stride, **kw), ReLU()]
            n_in = n_out
        self.cnn = Sequential(*layers, Flatten())
        self.linear = Sequential(nnx.Linear(math.prod(c.convolved), c.features_dim, **kw), ReLU())

    def __call__(self, x: Array) -> Array:
        """(B, H, W, C) -> (B, features_dim)."""
        return self.linear(self.cnn(x))


class QNetwork(nnx.Module):
    """A value for every action."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.features_extractor = NatureCNN(c, **kw) if c.images else Flatten()
        features = c.features_dim if c.images else math.prod(c.obs_shape)
        layers: list[nnx.Linear | ReLU] = []
        for n_in, n_out in pairwise((features, *c.net_arch, c.actions)):
            layers += [nnx.Linear(n_in, n_out, **kw), ReLU()]
        self.q_net = Sequential(*layers[:-1])  # no ReLU on the values

    def __call__(self, obs: Array) -> Array:
        """obs (B, H, W, C) or (B, size) -> values (B, A)."""
        if obs.dtype == jnp.uint8:
            obs = obs.astype(self.q_net[0].kernel.dtype) / 255
        return self.q_net(self.features_extractor(obs))


class DQNPolicy(nnx.Module):
    """The network that acts, and the target network where the config has one."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.q_net = QNetwork(c, **kw)
        self.q_net_target = QNetwork(c, **kw) if c.target else None

    def __call__(self, obs: Array) -> Output:
        """obs (B, H, W, C) or (B, size) -> Output.

        uint8 images are divided by 255; floats are taken as they are.
        """
        values = self.q_net(obs)
        target = None if self.q_net_target is None else self.q_net_target(obs)
        return Output(values, target)

    def act(
        self,
        obs: Array,
        epsilon: float | Array = 0.0,
        chance: Array | None = None,
        random_actions: Array | None = None,
    ) -> Array:
        """obs -> actions (B,), integers: those of the highest value, the first of equals.

        Where `chance`, (B,) or (), uniform in [0, 1), is below `epsilon`, the action is the one of
        `random_actions` (B,) instead. Upstream draws one `chance` for all observations.
        """
        greedy = self.q_net(obs).argmax(axis=1)
        if chance is None or random_actions is None:
            return greedy
        return jnp.where(chance < epsilon, random_actions, greedy)
