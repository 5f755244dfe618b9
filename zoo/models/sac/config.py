"""Hyper-parameters of SAC, under upstream's names, and the published size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0  # upstream's bounds
EPSILON = 1e-6  # upstream's, within the logarithm of tanh's derivative


@dataclass(frozen=True)
class Config:
    """Defaults: two hidden layers of 256, and the sizes of Pendulum."""

    obs_size: int = 3
    action_size: int = 1
    pi: tuple[int, ...] = (256, 256)  # units of the actor's hidden layers
    qf: tuple[int, ...] = (256, 256)  # and of the critics'
    target: bool = False  # whether the target critics are there too

    def __post_init__(self) -> None:
        object.__setattr__(self, "pi", tuple(self.pi))  # JSON has lists
        object.__setattr__(self, "qf", tuple(self.qf))
        if not self.pi:
            raise ValueError("the actor needs a hidden layer")


class Output(NamedTuple):
    """B observations, A numbers to an action."""

    mu: Any  # (B, A), of the Gaussian
    log_std: Any  # (B, A), of the Gaussian, between -20 and 2
    action: Any  # (B, A), tanh(mu): the deterministic action
    q0: Any  # (B, 1), the first critic on the action that was given
    q1: Any  # (B, 1), the second
    target_q0: Any  # (B, 1), the first target critic; None without target critics
    target_q1: Any  # (B, 1), the second


PRESETS = {"sac": Config()}

TINY = {
    "policy": Config(obs_size=4, action_size=2, pi=(6, 6), qf=(5, 5)),
    "target": Config(obs_size=3, action_size=1, pi=(5,), qf=(6,), target=True),
}
