"""The calls of NNX modules seen from outside: NNX has no hooks, so classes are patched."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_PATCHING = threading.RLock()  # classes are every thread's

# (path, submodule, call of the original, args, kwargs) -> output
Around = Callable[[str, Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@contextlib.contextmanager
def intercepted(
    modules: Mapping[str, Any],
    around: Around,
    find: Callable[[Any, Mapping[str, Any], dict[int, str]], str | None],
) -> Iterator[None]:
    """`around` the `__call__` of each of these NNX modules; the classes are restored afterwards.
    `find` says what a module is that was made meanwhile.

    A module is known by its identity, so that others of its class pass through, and so does what a
    `__call__` asks of its own base class.
    """
    paths = {id(m): path for path, m in modules.items()}
    active: list[Any] = []

    def wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def called(self: Any, *args: Any, **kwargs: Any) -> Any:
            path = paths.get(id(self))
            if path is None:
                path = find(self, modules, paths)
            if path is None or any(a is self for a in active):
                return original(self, *args, **kwargs)
            active.append(self)
            try:
                proceed = functools.partial(original, self)
                return around(path, self, proceed, args, kwargs)
            finally:
                active.pop()

        return called

    with _PATCHING:
        yield from _patched(modules, wrapper)


def _patched(modules: Mapping[str, Any], wrapper: Callable[..., Any]) -> Iterator[None]:
    classes: set[Any] = {type(m) for m in modules.values() if callable(m)}
    own = {c: c.__dict__.get("__call__") for c in classes}
    originals = {c: c.__call__ for c in classes}
    try:
        for c in classes:
            c.__call__ = wrapper(originals[c])
        yield
    finally:
        for c in classes:
            if own[c] is None:
                del c.__call__
            else:
                c.__call__ = own[c]
