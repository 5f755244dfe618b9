"""One run of a module, every call of every submodule recorded in the order of execution.

`torch_calls` finds them by hooks, `flax_calls` by interception: in NNX `__call__` of the classes
found in the module's graph (other methods are not seen), in Linen `flax.linen.intercept_methods`.
What runs inside jit, scan or vmap has no values to record; a note says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convert.runtime.arrays import leaves, replaced

# Which array: path of the submodule, index of its call, path within what it gives.
Place = tuple[str, int, str]


@dataclass
class Recorded:
    """One call of one submodule. Arrays are NumPy copies as the framework has them."""

    name: str  # dotted path, "" for the whole
    kind: str  # the class's name
    index: int  # which call of this submodule, from 0
    order: int  # when it began
    parent: int | None  # `order` of the call around it
    inputs: dict[str, np.ndarray]  # by argument: "input", "attended.key"
    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    end: int = -1  # when it ended; -1: it did not
    arguments: tuple[Any, Any] = ((), {})  # args and kwargs themselves (torch only)

    @property
    def key(self) -> tuple[str, int]:
        """Which call this is."""
        return self.name, self.index


@dataclass
class Trace:
    """A run: its calls in the order in which they began."""

    calls: list[Recorded]
    notes: list[str]
    output: Any = None
    # Submodules of torch that drew random numbers, the innermost before those around it.
    drawing: list[str] = field(default_factory=list)
    as_called: bool = False  # one compiled function of the Flax module as it is, no scan unrolled

    def places(self) -> dict[Place, np.ndarray]:
        """What the submodules gave, the whole left out."""
        return {(c.name, c.index, k): x for c in self.calls if c.name for k, x in c.outputs.items()}

    def by_key(self) -> dict[tuple[str, int], Recorded]:
        """(name, index) -> call."""
        return {c.key: c for c in self.calls}

    def names(self) -> list[str]:
        """Submodules in the order of their first call."""
        return list(dict.fromkeys(c.name for c in self.calls))


class Recorder:
    """Puts calls into a Trace as they begin and end."""

    def __init__(self) -> None:
        self.trace = Trace([], [])
        self._stack: list[Recorded] = []
        self._counts: dict[str, int] = {}
        self._clock = 0

    def enter(self, name: str, kind: str, inputs: dict[str, np.ndarray]) -> Recorded:
        """A call begins."""
        index = self._counts.get(name, 0)
        self._counts[name] = index + 1
        parent = self._stack[-1].order if self._stack else None
        call = Recorded(name, kind, index, self._tick(), parent, inputs)
        self.trace.calls.append(call)
        self._stack.append(call)
        return call

    def leave(self, outputs: dict[str, np.ndarray]) -> Recorded:
        """The innermost call ends."""
        call = self._stack.pop()
        call.outputs, call.end = outputs, self._tick()
        return call

    @property
    def current(self) -> Recorded | None:
        """The innermost call that goes on."""
        return self._stack[-1] if self._stack else None

    def note(self, text: str) -> None:
        """Something that was not recorded; said once."""
        if text not in self.trace.notes:
            self.trace.notes.append(text)

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def named_arguments(function: Any, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names of their parameters; by position where there is no signature."""
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return {str(i): a for i, a in enumerate(args)} | dict(kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        else:
            named[name] = value
    return named


def array_arguments(function: Any, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Every array among the arguments, by parameter and path within it."""
    return leaves(named_arguments(function, args, kwargs))


def with_arguments(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], values: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """args and kwargs with other arrays at the paths that `array_arguments` gives."""
    if not values:
        return args, dict(kwargs)
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except (TypeError, ValueError):
        named = {str(i): a for i, a in enumerate(args)} | dict(kwargs)
        new = replaced(named, values)
        return tuple(new[str(i)] for i in range(len(args))), {k: new[k] for k in kwargs}
    for name, value in list(bound.arguments.items()):
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            bound.arguments[name] = replaced(value, values)
        else:
            bound.arguments[name] = replaced({name: value}, values)[name]
    return bound.args, bound.kwargs
