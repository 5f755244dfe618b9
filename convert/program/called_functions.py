"""The functions that a module's own code calls by name, seen from outside while a graph is made."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

Instead = Callable[[FunctionType], Callable[..., Any]]


def own_functions(root: Any) -> list[tuple[dict[str, Any], str, FunctionType]]:
    """The functions of the package of each part's class, or of the user's own files: the names that
    mean them in the code of these classes, and of such functions themselves."""
    found: list[tuple[dict[str, Any], str, FunctionType]] = []
    seen: set[int] = set()
    classes = {c for part in root.modules() for c in type(part).__mro__ if _is_own(c.__module__)}
    files = [vars(sys.modules[name]) for name in sorted({c.__module__ for c in classes})]
    while files:
        names = files.pop()
        if id(names) in seen:
            continue
        seen.add(id(names))
        for name, value in list(names.items()):
            if type(value) is FunctionType and _is_own(value.__module__ or ""):
                found.append((names, name, value))
                files.append(inspect.unwrap(value).__globals__)
    return found


@functools.cache
def _is_own(module: str) -> bool:
    """Whether a module may hold code that is ported: none of Python's, nor of what a port keeps."""
    top = module.partition(".")[0]
    return (
        module in sys.modules
        and top not in sys.stdlib_module_names | {"torch", "numpy", "einops", "functorch"}
    ) or top == "__main__"


@contextlib.contextmanager
def functions_seen(root: Any, instead: Instead) -> Iterator[None]:
    """While it lasts, the names of these functions mean what `instead` makes of them."""
    made: dict[int, Callable[..., Any]] = {}
    with contextlib.ExitStack() as before:
        for names, name, function in own_functions(root):
            if id(function) not in made:
                made[id(function)] = functools.wraps(function)(instead(function))
            before.callback(names.__setitem__, name, function)
            names[name] = made[id(function)]
        yield
