"""The table of operations: one JAX rule for each overload of torch's ATen.

A rule is a plain function on JAX values. It is called with the overload's arguments as the exported
graph has them: tensors are JAX arrays, sizes are ints, a torch.dtype is a NumPy one, Python scalars
stay Python scalars. `device`, `layout`, `pin_memory`, `memory_format`, `non_blocking` and
`requires_grad` are left out by the caller. It gives one array, or a tuple where the overload gives
several; the dtype is torch's. What a rule does not support it refuses by NotImplementedError: it
never gives something near.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from zoo.plugins import load

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Rule:
    """How JAX computes an overload. A random one takes `rng`, which gives a fresh key a call."""

    name: str
    function: Callable[..., Any]
    random: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


RULES: dict[str, Rule] = {}
_LOADED: list[bool] = []


def rule(*names: str, random: bool = False) -> Callable[[F], F]:
    """Enter a function into the table as the rule of these overloads ("aten.addmm.default")."""

    def enter(function: F) -> F:
        for name in names:
            RULES[name] = Rule(name, function, random)
        return function

    return enter


def rules_of(functions: Iterable[tuple[str, Callable[..., Any]]], *overloads: str) -> None:
    """Enter several functions, each by its operation's name, for the same overloads."""
    for name, function in functions:
        rule(*(f"aten.{name}.{overload}" for overload in overloads or ("default",)))(function)


def table() -> dict[str, Rule]:
    """The whole table: ours, then what other packages add (entry points `zooconvert.rules`, each
    a module that calls `rule`, or a dict of functions by overload), which wins."""
    if not _LOADED:
        for module in pkgutil.iter_modules(__path__):
            importlib.import_module(f"{__name__}.{module.name}")
        for _, found in load("zooconvert.rules"):
            for name, function in found.items() if isinstance(found, dict) else ():
                rule(name, random=bool(getattr(function, "random", False)))(function)
        _LOADED.append(True)
    return RULES


def find(name: str) -> Rule | None:
    """The rule of an overload ("aten.addmm.default"); None if there is none."""
    return table().get(name)
