"""One side of a comparison: a module, its inputs, and how its names and axes read on the other.

`TorchSide` and `FlaxSide` can be run forward, differentiated and trained, in float32 and in
float64; whatever they give has torch's names and axes and is a NumPy array.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from convert.judge.noise import PRECISIONS, Arrays
from convert.runtime.trace import Place
from zoo import probe

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A forward pass, and the backward pass if one was asked for."""

    outputs: Arrays
    intermediates: Arrays = field(default_factory=dict)  # in the order of execution on torch's side
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


class Axes(Protocol):
    """How named inputs, outputs and intermediates lie on the two sides."""

    @abstractmethod
    def to_flax(self, name: str, array: np.ndarray) -> np.ndarray:
        """An array with torch's axes in Flax's order."""

    @abstractmethod
    def from_flax(self, name: str, array: np.ndarray) -> np.ndarray:
        """The inverse."""


class Side(ABC):
    """A module and its inputs. Neither is ever changed.

    `watched` says which intermediates are wanted, and what each is called: None for all of them,
    each called after its own place.
    """

    framework: str
    precisions: tuple[str, ...] = PRECISIONS  # float32 alone where the module fixes its dtype
    watched: Mapping[Place, str] | None = None

    @abstractmethod
    def run(self, precision: str, *, backward: bool) -> Run:
        """Forward in eval mode, and the gradients of the loss if they are wanted."""

    def exactly_summed(self, *, backward: bool) -> Run | None:
        """`run` in float32 with all sums in float64, where the framework's own lose digits."""
        return None

    @abstractmethod
    def train(self, precision: str, optimizer: Optimizer, steps: int) -> Trained:
        """Steps on the one batch. Dropout stays off; norms use and move their batch statistics."""

    @abstractmethod
    def narrow_operation(self) -> str | None:
        """An operation that computes in fewer than 64 bits when all is cast to 64, if there is
        one."""

    def named(self, seen: Mapping[Place, Any]) -> dict[str, Any]:
        """The watched intermediates by name."""
        if self.watched is None:
            return {title(place): x for place, x in seen.items()}
        return {self.watched[place]: x for place, x in seen.items() if place in self.watched}


def title(place: Place) -> str:
    """What an intermediate is called: "layers.0", "layers.0#2" for its second call, "layers.0:1"
    for the second of several arrays that it gives."""
    name, index, key = place
    return name + (f"#{index + 1}" if index else "") + (f":{key}" if key else "")


def real_parts(
    outputs: Mapping[str, Any], inexact: Callable[[Any], bool]
) -> Iterator[tuple[str, Any]]:
    """The floating-point outputs, complex ones as two, their real and their imaginary part."""
    for name, x in outputs.items():
        if not inexact(x):
            continue
        if "complex" in str(x.dtype):
            yield from ((name, x.real), (f"{name}.imag", x.imag))
        else:
            yield name, x


def exact(runs: Mapping[str, T]) -> T:
    """The most precise of the runs."""
    return runs.get("float64", runs["float32"])


def loss_weights(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """What an output is multiplied by in the loss: another number for every element."""
    return probe.normal(f"{seed}:{name}" if seed else name, shape)
