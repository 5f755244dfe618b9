"""DQN in Flax NNX: the twin of model_torch.py, class by class.

B observations, A actions; images are (B, H, W, C), vectors (B, size).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from zoo.models.dqn.config import CONVOLUTIONS, Config, Output
from zoo.nn.conv_flax import Conv2d
from zoo.nn.pool_flax import flatten
from zoo.nn.taps import Taps


class NatureCNN(nnx.Module):
    """Three convolutions and a linear layer, a ReLU after each: (B, H, W, C) -> (B, features)."""

    def __init__(self, c: Config, **kw: Any) -> None:
        layers: list[Any] = []
        channels = c.obs_shape[0]
        for out, kernel, stride in CONVOLUTIONS:
            layers += [Conv2d(channels, out, kernel, stride, **kw), jax.nn.relu]
            channels = out
        self.cnn = nnx.List(layers)
        units: list[Any] = [nnx.Linear(math.prod(c.convolved), c.features_dim, **kw), jax.nn.relu]
        self.linear = nnx.List(units)

    def __call__(self, x: Array, tap: Taps) -> Array:
        for i, layer in enumerate(self.cnn):
            x = tap(f"cnn.{i}", layer(x))
        x = flatten(x)  # channel-first, as torch has it
        for layer in self.linear:
            x = layer(x)
        return tap("linear", x)


class QNetwork(nnx.Module):
    """A value for every action."""

    def __init__(self, c: Config, **kw: Any) -> None:
        self.images = c.images
        if c.images:
            self.features_extractor = NatureCNN(c, **kw)
        size = c.features_dim if c.images else math.prod(c.obs_shape)
        layers: list[Any] = []
        for n_in, n_out in itertools.pairwise((size, *c.net_arch, c.actions)):
            layers += [nnx.Linear(n_in, n_out, **kw), jax.nn.relu]
        self.q_net = nnx.List(layers[:-1])  # no ReLU on the values

    def __call__(self, obs: Array, tap: Taps | None = None) -> Array:
        """obs as DQNPolicy takes it -> (B, A)."""
        tap = tap or Taps(False)
        if obs.dtype == jnp.uint8:
            obs = obs.astype(self.q_net[0].kernel.dtype) / 255
        x = obs
        if self.images:
            x = tap("features_extractor", self.features_extractor(x, tap.at("features_extractor")))
        for i, layer in enumerate(self.q_net):
            x = tap(f"q_net.{i}", layer(x))
        return x


class DQNPolicy(nnx.Module):
    """The network that acts, and the target network where the config has one."""

    def __init__(self, c: Config, **kw: Any) -> None:
        self.q_net = QNetwork(c, **kw)
        self.q_net_target = QNetwork(c, **kw) if c.target else None

    def __call__(self, obs: Array, taps: bool = False) -> Any:
        """obs (B, H, W, C) or (B, size) -> Output.

        uint8 images are divided by 255; floats are taken as they are. `taps=True` gives
        (Output, {module path: intermediate}).
        """
        tap = Taps(taps)
        values = self.q_net(obs, tap.at("q_net"))
        target = None
        if self.q_net_target is not None:
            target = self.q_net_target(obs, tap.at("q_net_target"))
        return tap.result(Output(values, target))

    def act(
        self,
        obs: Array,
        epsilon: float | Array = 0.0,
        chance: Array | None = None,
        random_actions: Array | None = None,
    ) -> Array:
        """Actions (B,), integers: those of the highest value, the first of equals.

        Where `chance` (B,) or (), uniform in [0, 1), is below `epsilon`, that of `random_actions`
        (B,) instead. Upstream draws one `chance` for all observations.
        """
        greedy = self.q_net(obs).argmax(axis=1)
        if chance is None or random_actions is None:
            return greedy
        return jnp.where(chance < epsilon, random_actions, greedy)
