"""One side of a comparison: a module, its inputs, and how its names and axes read on the other.

`TorchSide` and `FlaxSide` can be run forward, differentiated and trained, in float32 and in
float64; whatever they give has torch's names and axes and is a NumPy array.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from convert.judge.noise import PRECISIONS, Arrays
from convert.matching.pair import Call

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


def leaves(call: Call) -> dict[str, np.ndarray]:
    """The arrays among the arguments: "0", "1.0" (in the second), "mask"."""
    found: dict[str, np.ndarray] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, np.ndarray):
            found[path] = value
        elif isinstance(value, Mapping):
            for k, v in value.items():
                walk(f"{path}.{k}", v)
        elif isinstance(value, tuple | list):
            for i, v in enumerate(value):
                walk(f"{path}.{i}", v)

    for key, value in [*enumerate(call.args), *call.kwargs.items()]:
        walk(str(key), value)
    return found


def with_leaves(call: Call, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """args and kwargs with other values in the places of `leaves`."""

    def walk(path: str, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return values[path]
        if isinstance(value, Mapping):
            return {k: walk(f"{path}.{k}", v) for k, v in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(walk(f"{path}.{i}", v) for i, v in enumerate(value)))
        if isinstance(value, tuple | list):
            return type(value)(walk(f"{path}.{i}", v) for i, v in enumerate(value))
        return value

    args = tuple(walk(str(i), v) for i, v in enumerate(call.args))
    return args, {k: walk(k, v) for k, v in call.kwargs.items()}


def cast(arrays: Mapping[str, np.ndarray], precision: str) -> Arrays:
    """Floating-point arrays in `precision`, others as they are."""
    return {
        k: v.astype(precision) if np.issubdtype(v.dtype, np.floating) else v
        for k, v in arrays.items()
    }


def argument_names(forward: Callable[..., Any], call: Call) -> dict[str, str]:
    """What the leaves are called: positional arguments by the parameter they are given to."""
    try:
        parameters = [
            p.name
            for p in inspect.signature(forward).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):
        parameters = []
    names = {}
    for path in leaves(call):
        first, dot, rest = path.partition(".")
        if first.isdigit() and int(first) < len(parameters):
            first = parameters[int(first)]
        names[path] = first + dot + rest
    return names
