"""SAC in Flax NNX: the twin of model_torch.py, class by class.

B observations of O numbers, A numbers to an action, each between -1 and 1.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from zoo.models.sac.config import EPSILON, LOG_STD_MAX, LOG_STD_MIN, Config, Output
from zoo.nn.taps import Taps

OFF = Taps(False)


def mlp(*sizes: int, **kw: Any) -> list[Any]:
    """Linear layers, and a ReLU after each."""
    layers: list[Any] = []
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [nnx.Linear(n_in, n_out, **kw), jax.nn.relu]
    return layers


class Actor(nnx.Module):
    """A Gaussian over actions before tanh."""

    def __init__(self, c: Config, **kw: Any) -> None:
        self.latent_pi = nnx.List(mlp(c.obs_size, *c.pi, **kw))
        self.mu = nnx.Linear(c.pi[-1], c.action_size, **kw)
        self.log_std = nnx.Linear(c.pi[-1], c.action_size, **kw)

    def __call__(self, obs: Array, tap: Taps = OFF) -> tuple[Array, Array]:
        """obs (B, O) -> mean and logarithm of the standard deviation, both (B, A)."""
        x = obs
        for i, layer in enumerate(self.latent_pi):
            x = tap(f"latent_pi.{i}", layer(x))
        return self.mu(x), tap("log_std", self.log_std(x)).clip(LOG_STD_MIN, LOG_STD_MAX)


class Critic(nnx.Module):
    """Two values of one action, each from a net of its own."""

    def __init__(self, c: Config, **kw: Any) -> None:
        sizes = (c.obs_size + c.action_size, *c.qf, 1)
        self.qf0 = nnx.List(mlp(*sizes, **kw)[:-1])  # no ReLU on a value
        self.qf1 = nnx.List(mlp(*sizes, **kw)[:-1])

    def __call__(self, obs: Array, action: Array, tap: Taps = OFF) -> tuple[Array, Array]:
        """obs (B, O), action (B, A) -> two values, both (B, 1)."""
        q0 = q1 = jnp.concatenate([obs, action], axis=1)
        for i, layer in enumerate(self.qf0):
            q0 = tap(f"qf0.{i}", layer(q0))
        for i, layer in enumerate(self.qf1):
            q1 = tap(f"qf1.{i}", layer(q1))
        return q0, q1


class SACPolicy(nnx.Module):
    """Actor and critics, and the target critics where the config has them."""

    def __init__(self, c: Config, **kw: Any) -> None:
        self.actor = Actor(c, **kw)
        self.critic = Critic(c, **kw)
        self.critic_target = Critic(c, **kw) if c.target else None

    def __call__(self, obs: Array, action: Array, taps: bool = False) -> Any:
        """obs (B, O), an action (B, A) for the critics -> Output.

        `taps=True` gives (Output, {module path: intermediate}).
        """
        tap = Taps(taps)
        mu, log_std = self.actor(obs, tap.at("actor"))
        q0, q1 = self.critic(obs, action, tap.at("critic"))
        targets: tuple[Any, Any] = (None, None)
        if self.critic_target is not None:
            targets = self.critic_target(obs, action, tap.at("critic_target"))
        return tap.result(Output(mu, log_std, jnp.tanh(mu), q0, q1, *targets))

    def act(self, obs: Array) -> Array:
        """The deterministic actions (B, A), between -1 and 1."""
        mu, _ = self.actor(obs)
        return jnp.tanh(mu)

    def sample(self, obs: Array, noise: Array) -> tuple[Array, Array]:
        """obs (B, O), standard normal noise (B, A) -> actions (B, A), their log-density (B,)."""
        mu, log_std = self.actor(obs)
        std = jnp.exp(log_std)
        gaussian = mu + std * noise
        action = jnp.tanh(gaussian)
        density = -((gaussian - mu) ** 2) / (2 * std**2) - log_std - math.log(2 * math.pi) / 2
        squashed = jnp.log(1 - action**2 + EPSILON)  # by tanh's derivative
        return action, density.sum(axis=1) - squashed.sum(axis=1)
