"""DQN in PyTorch. Mnih 2015, https://doi.org/10.1038/nature14236; names from stable-baselines3's
dqn/policies.py.

B observations, A actions; images are (B, C, H, W), vectors (B, size).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Unpack

import torch
from torch import Tensor, nn

from zoo.models.dqn.config import CONVOLUTIONS, Config, Output
from zoo.nn.conv_torch import Conv2d
from zoo.nn.layers_torch import Linear
from zoo.nn.options_torch import Options


class NatureCNN(nn.Module):
    """Three convolutions and a linear layer, a ReLU after each (Mnih 2015, Methods)."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        n_in = c.obs_shape[0]
        for n_out, kernel, stride in CONVOLUTIONS:
            layers += [Conv2d(n_in, n_out, kernel, stride, **kw), nn.ReLU()]
            n_in = n_out
        self.cnn = nn.Sequential(*layers, nn.Flatten())
        self.linear = nn.Sequential(Linear(math.prod(c.convolved), c.features_dim, **kw), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, features_dim)."""
        return self.linear(self.cnn(x))


class QNetwork(nn.Module):
    """A value for every action."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.features_extractor = NatureCNN(c, **kw) if c.images else nn.Flatten()
        features = c.features_dim if c.images else math.prod(c.obs_shape)
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise((features, *c.net_arch, c.actions)):
            layers += [Linear(n_in, n_out, **kw), nn.ReLU()]
        self.q_net = nn.Sequential(*layers[:-1])  # no ReLU on the values

    def forward(self, obs: Tensor) -> Tensor:
        """obs (B, C, H, W) or (B, size) -> values (B, A)."""
        if obs.dtype == torch.uint8:
            obs = obs.to(next(self.parameters()).dtype) / 255
        return self.q_net(self.features_extractor(obs))


class DQNPolicy(nn.Module):
    """The network that acts, and the target network where the config has one."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.q_net = QNetwork(c, **kw)
        self.q_net_target = QNetwork(c, **kw) if c.target else None

    def forward(self, obs: Tensor) -> Output:
        """obs (B, C, H, W) or (B, size) -> Output.

        uint8 images are divided by 255; floats are taken as they are.
        """
        values = self.q_net(obs)
        target = None if self.q_net_target is None else self.q_net_target(obs)
        return Output(values, target)

    def act(
        self,
        obs: Tensor,
        epsilon: float | Tensor = 0.0,
        chance: Tensor | None = None,
        random_actions: Tensor | None = None,
    ) -> Tensor:
        """obs -> actions (B,), int64: those of the highest value, the first of equals.

        Where `chance`, (B,) or (), uniform in [0, 1), is below `epsilon`, the action is the one of
        `random_actions` (B,) instead. Upstream draws one `chance` for all observations.
        """
        greedy = self.q_net(obs).argmax(dim=1)
        if chance is None or random_actions is None:
            return greedy
        return torch.where(chance < epsilon, random_actions, greedy)
