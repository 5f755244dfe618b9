"""SAC in Flax NNX: the twin of model_torch.py, class by class.

Haarnoja 2018, https://arxiv.org/abs/1801.01290 and https://arxiv.org/abs/1812.05905; names from
stable-baselines3's sac/policies.py.

B observations of O numbers, A numbers to an action, each between -1 and 1.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from jax import Array

from zoo.models.sac.config import EPSILON, LOG_STD_MAX, LOG_STD_MIN, Config, Output
from zoo.nn.layers_flax import ReLU, Sequential
from zoo.nn.options_flax import Options


def mlp(*sizes: int, **kw: Unpack[Options]) -> list[nnx.Linear | ReLU]:
    """Linear layers, each followed by a ReLU."""
    layers: list[nnx.Linear | ReLU] = []
    for n_in, n_out in pairwise(sizes):
        layers += [nnx.Linear(n_in, n_out, **kw), ReLU()]
    return layers


class Actor(nnx.Module):
    """The Gaussian of actions before tanh: its mean and the logarithm of its standard deviation."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.latent_pi = Sequential(*mlp(c.obs_size, *c.pi, **kw))
        self.mu = nnx.Linear(c.pi[-1], c.action_size, **kw)
        self.log_std = nnx.Linear(c.pi[-1], c.action_size, **kw)

    def __call__(self, obs: Array) -> tuple[Array, Array]:
        """obs (B, O) -> mu and log_std, both (B, A)."""
        x = self.latent_pi(obs)
        return self.mu(x), self.log_std(x).clip(LOG_STD_MIN, LOG_STD_MAX)


class Critic(nnx.Module):
    """Two values of an action, each from a network of its own."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        sizes = (c.obs_size + c.action_size, *c.qf, 1)
        self.qf0 = Sequential(*mlp(*sizes, **kw)[:-1])  # no ReLU on a value
        self.qf1 = Sequential(*mlp(*sizes, **kw)[:-1])

    def __call__(self, obs: Array, action: Array) -> tuple[Array, Array]:
        """obs (B, O), action (B, A) -> two values, both (B, 1)."""
        x = jnp.concatenate([obs, action], axis=1)
        return self.qf0(x), self.qf1(x)


class SACPolicy(nnx.Module):
    """Actor and critics, and the target critics where the config has them."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.actor = Actor(c, **kw)
        self.critic = Critic(c, **kw)
        self.critic_target = Critic(c, **kw) if c.target else None

    def __call__(self, obs: Array, action: Array) -> Output:
        """obs (B, O), action (B, A), which only the critics see -> Output."""
        mu, log_std = self.actor(obs)
        values = self.critic(obs, action)
        targets = (None, None) if self.critic_target is None else self.critic_target(obs, action)
        return Output(mu, log_std, jnp.tanh(mu), *values, *targets)

    def act(self, obs: Array) -> Array:
        """obs (B, O) -> the deterministic actions (B, A), between -1 and 1."""
        mu, _ = self.actor(obs)
        return jnp.tanh(mu)

    def sample(self, obs: Array, noise: Array) -> tuple[Array, Array]:
        """obs (B, O), standard normal noise (B, A) -> actions (B, A), their log-density (B,).

        The density is the Gaussian's divided by the derivative of tanh (Haarnoja 2018, appendix C).
        """
        mu, log_std = self.actor(obs)
        std = jnp.exp(log_std)
        gaussian = mu + std * noise
        action = jnp.tanh(gaussian)
        log_density = -((gaussian - mu) ** 2) / (2 * std**2) - log_std - math.log(2 * math.pi) / 2
        log_slope = jnp.log(1 - action**2 + EPSILON)
        return action, log_density.sum(axis=1) - log_slope.sum(axis=1)
