"""SAC in PyTorch. Haarnoja 2018, https://arxiv.org/abs/1801.01290 and
https://arxiv.org/abs/1812.05905; names from stable-baselines3's sac/policies.py.

B observations of O numbers, A numbers to an action, each between -1 and 1.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Unpack

import torch
from torch import Tensor, nn

from zoo.models.sac.config import EPSILON, LOG_STD_MAX, LOG_STD_MIN, Config, Output
from zoo.nn.layers_torch import Linear
from zoo.nn.options_torch import Options


def mlp(*sizes: int, **kw: Unpack[Options]) -> list[nn.Module]:
    """Linear layers, each followed by a ReLU."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layers += [Linear(n_in, n_out, **kw), nn.ReLU()]
    return layers


class Actor(nn.Module):
    """The Gaussian of actions before tanh: its mean and the logarithm of its standard deviation."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.latent_pi = nn.Sequential(*mlp(c.obs_size, *c.pi, **kw))
        self.mu = Linear(c.pi[-1], c.action_size, **kw)
        self.log_std = Linear(c.pi[-1], c.action_size, **kw)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """obs (B, O) -> mu and log_std, both (B, A)."""
        x = self.latent_pi(obs)
        return self.mu(x), self.log_std(x).clamp(LOG_STD_MIN, LOG_STD_MAX)


class Critic(nn.Module):
    """Two values of an action, each from a network of its own."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        sizes = (c.obs_size + c.action_size, *c.qf, 1)
        self.qf0 = nn.Sequential(*mlp(*sizes, **kw)[:-1])  # no ReLU on a value
        self.qf1 = nn.Sequential(*mlp(*sizes, **kw)[:-1])

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """obs (B, O), action (B, A) -> two values, both (B, 1)."""
        x = torch.cat([obs, action], dim=1)
        return self.qf0(x), self.qf1(x)


class SACPolicy(nn.Module):
    """Actor and critics, and the target critics where the config has them."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.actor = Actor(c, **kw)
        self.critic = Critic(c, **kw)
        self.critic_target = Critic(c, **kw) if c.target else None

    def forward(self, obs: Tensor, action: Tensor) -> Output:
        """obs (B, O), action (B, A), which only the critics see -> Output."""
        mu, log_std = self.actor(obs)
        values = self.critic(obs, action)
        targets = (None, None) if self.critic_target is None else self.critic_target(obs, action)
        return Output(mu, log_std, torch.tanh(mu), *values, *targets)

    def act(self, obs: Tensor) -> Tensor:
        """obs (B, O) -> the deterministic actions (B, A), between -1 and 1."""
        mu, _ = self.actor(obs)
        return torch.tanh(mu)

    def sample(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """obs (B, O), standard normal noise (B, A) -> actions (B, A), their log-density (B,).

        The density is the Gaussian's divided by the derivative of tanh (Haarnoja 2018, appendix C).
        """
        mu, log_std = self.actor(obs)
        std = log_std.exp()
        gaussian = mu + std * noise
        action = torch.tanh(gaussian)
        log_density = -((gaussian - mu) ** 2) / (2 * std**2) - log_std - math.log(2 * math.pi) / 2
        log_slope = torch.log(1 - action**2 + EPSILON)
        return action, log_density.sum(dim=1) - log_slope.sum(dim=1)
