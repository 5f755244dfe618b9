"""DQN in PyTorch. Mnih 2015, https://doi.org/10.1038/nature14236; names from stable-baselines3.

B observations, A actions; images are (B, C, H, W), vectors (B, size).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from zoo.models.dqn.config import CONVOLUTIONS, Config, Output
from zoo.nn.conv_torch import Conv2d
from zoo.nn.layers_torch import Linear
from zoo.nn.taps import Taps


class NatureCNN(nn.Module):
    """Three convolutions and a linear layer, a ReLU after each: (B, C, H, W) -> (B, features)."""

    def __init__(self, c: Config, **kw: Any) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = c.obs_shape[0]
        for out, kernel, stride in CONVOLUTIONS:
            layers += [Conv2d(channels, out, kernel, stride, **kw), nn.ReLU()]
            channels = out
        self.cnn = nn.ModuleList(layers)
        units = [Linear(math.prod(c.convolved), c.features_dim, **kw), nn.ReLU()]
        self.linear = nn.ModuleList(units)

    def forward(self, x: Tensor, tap: Taps) -> Tensor:
        for i, layer in enumerate(self.cnn):
            x = tap(f"cnn.{i}", layer(x))
        x = x.flatten(1)
        for layer in self.linear:
            x = layer(x)
        return tap("linear", x)


class QNetwork(nn.Module):
    """A value for every action."""

    def __init__(self, c: Config, **kw: Any) -> None:
        super().__init__()
        self.images = c.images
        if c.images:
            self.features_extractor = NatureCNN(c, **kw)
        size = c.features_dim if c.images else math.prod(c.obs_shape)
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise((size, *c.net_arch, c.actions)):
            layers += [Linear(n_in, n_out, **kw), nn.ReLU()]
        self.q_net = nn.ModuleList(layers[:-1])  # no ReLU on the values

    def forward(self, obs: Tensor, tap: Taps | None = None) -> Tensor:
        """obs as DQNPolicy takes it -> (B, A)."""
        tap = tap or Taps(False)
        if obs.dtype == torch.uint8:
            obs = obs.to(next(self.parameters()).dtype) / 255
        x = obs
        if self.images:
            x = tap("features_extractor", self.features_extractor(x, tap.at("features_extractor")))
        for i, layer in enumerate(self.q_net):
            x = tap(f"q_net.{i}", layer(x))
        return x


class DQNPolicy(nn.Module):
    """The network that acts, and the target network where the config has one."""

    def __init__(self, c: Config, **kw: Any) -> None:
        super().__init__()
        self.q_net = QNetwork(c, **kw)
        self.q_net_target = QNetwork(c, **kw) if c.target else None

    def forward(self, obs: Tensor, taps: bool = False) -> Any:
        """obs (B, C, H, W) or (B, size) -> Output.

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
        obs: Tensor,
        epsilon: float | Tensor = 0.0,
        chance: Tensor | None = None,
        random_actions: Tensor | None = None,
    ) -> Tensor:
        """Actions (B,), int64: those of the highest value, the first of equals.

        Where `chance` (B,) or (), uniform in [0, 1), is below `epsilon`, that of `random_actions`
        (B,) instead. Upstream draws one `chance` for all observations.
        """
        greedy = self.q_net(obs).argmax(dim=1)
        if chance is None or random_actions is None:
            return greedy
        return torch.where(chance < epsilon, random_actions, greedy)
