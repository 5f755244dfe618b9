"""The arguments of a forward pass, and the arrays among them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convert.judge.noise import Arrays


@dataclass(frozen=True)
class Call:
    """Arguments of a forward pass, as NumPy arrays or plain values."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


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
