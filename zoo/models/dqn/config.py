"""Hyper-parameters of a DQN, and the sizes that are in use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

# NatureCNN's layers: channels out, kernel, stride; no padding.
CONVOLUTIONS = ((32, 8, 4), (64, 4, 2), (64, 3, 1))


@dataclass(frozen=True)
class Config:
    """Defaults are those of Atari: four frames of 84 x 84, upstream's CnnPolicy."""

    obs_shape: tuple[int, ...] = (4, 84, 84)  # (channels, height, width), or (size,) of a vector
    actions: int = 6
    features_dim: int = 512  # units on the convolutions
    net_arch: tuple[int, ...] = ()  # units of the hidden layers below the values
    target: bool = False  # whether the target network is there too

    def __post_init__(self) -> None:
        object.__setattr__(self, "obs_shape", tuple(self.obs_shape))  # JSON has lists
        object.__setattr__(self, "net_arch", tuple(self.net_arch))
        if len(self.obs_shape) not in (1, 3):
            raise ValueError(f"obs_shape {self.obs_shape} is neither (C, H, W) nor (size,)")
        if self.images and min(self.convolved[1:]) < 1:
            raise ValueError(f"images of {self.obs_shape} are too small for the convolutions")

    @property
    def images(self) -> bool:
        """Whether observations are images (upstream's CnnPolicy), or vectors (MlpPolicy)."""
        return len(self.obs_shape) == 3

    @property
    def convolved(self) -> tuple[int, int, int]:
        """(channels, height, width) after the convolutions."""
        channels, height, width = self.obs_shape
        for channels, kernel, stride in CONVOLUTIONS:  # noqa: B007 - the last one's
            height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
        return channels, height, width


class Output(NamedTuple):
    """B observations, A actions."""

    q_values: Any  # (B, A)
    target_q_values: Any  # (B, A); None without a target network


_VECTOR = Config(obs_shape=(4,), actions=2, net_arch=(64, 64))

PRESETS = {"dqn_nature": Config(), "dqn_cartpole": _VECTOR}

TINY = {
    "images": Config(obs_shape=(2, 44, 52), actions=3, features_dim=8),
    "vector": replace(_VECTOR, net_arch=(7, 6)),
    "target": replace(_VECTOR, obs_shape=(3,), actions=3, net_arch=(5,), target=True),
}
