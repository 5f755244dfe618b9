"""One side of a comparison: a module, its inputs, and how its names and axes read on the other.

`TorchSide` and `FlaxSide` can be run forward, differentiated and trained, in float32 and in
float64; whatever they give has torch's names and axes and is a NumPy array.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from convert.judge.noise import PRECISIONS, Arrays

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A forward pass, and the backward pass if one was asked for."""

    outputs: Arrays  # outputs and intermediates, in order of execution
    loss: float = 0.0
    gradients: Arrays = field(default_factory=dict)  # by parameter, and `in.NAME` for inputs


@dataclass(frozen=True)
class Trained:
    """A few optimizer steps."""

    losses: list[float]  # before each step, and after all
    state: Arrays  # parameters and running statistics after all steps
    gradients: list[Arrays]  # of the parameters, before each step


@dataclass(frozen=True)
class Optimizer:
    """One rule, the same in torch.optim and in optax."""

    name: str
    rate: float
    torch: Callable[[Any], Any]  # parameters -> torch.optim.Optimizer
    optax: Callable[[], Any]  # -> GradientTransformation


class Side(ABC):
    """A module and its inputs. Neither is ever changed."""

    framework: str
    precisions: tuple[str, ...] = PRECISIONS  # float32 alone where the module fixes its dtype

    @abstractmethod
    def run(self, precision: str, *, backward: bool) -> Run:
        """Forward in eval mode, and the gradients of the loss if they are wanted."""

    @abstractmethod
    def train(self, precision: str, optimizer: Optimizer, steps: int) -> Trained:
        """Steps on the one batch. Dropout stays off; norms use and move their batch statistics."""


def exact(runs: Mapping[str, T]) -> T:
    """The most precise of the runs."""
    return runs.get("float64", runs["float32"])
