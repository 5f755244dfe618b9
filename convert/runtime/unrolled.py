"""Layers that are stacked and scanned, run one after the other: inside `jax.lax.scan` there are no
values, and one module stands for all layers. Layer i of the stack `layers` is called `layers.i`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np

from convert.runtime.arrays import is_array

_PATCHING = threading.RLock()  # jax.lax is every thread's


class Unrolled:
    """`values` are a module's by dotted path. `stacks`: path -> number of layers, of each scan over
    values of the module that was met."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.stacks: dict[str, int] = {}
        self._open: list[tuple[str, int]] = []  # the scans that go on: path, index of the layer
        self._kept: list[Any] = []  # so that no identity is used twice

    def path(self, path: str) -> str:
        """The path of a module, with the indices of the layers that it is in."""
        for stack, index in reversed(self._open):
            if path == stack or path.startswith(f"{stack}."):
                path = f"{stack}.{index}{path.removeprefix(stack)}"
        return path

    def find(self, part: Any, modules: Mapping[str, Any], paths: dict[int, str]) -> str | None:
        """The path of an NNX module that was made anew for one layer; its parts are put into
        `paths` too."""
        if not self._open:
            return None
        stack = self._open[-1][0]
        within = [
            p
            for p, m in modules.items()
            if type(m) is type(part) and (p == stack or p.startswith(f"{stack}."))
        ]
        if not within:
            return None
        from flax import nnx

        path = min(within, key=len)
        for below, inner in nnx.iter_modules(part):
            self._kept.append(inner)
            paths[id(inner)] = ".".join((path, *map(str, below)))
        return path

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """While it lasts, scans over values of the module are loops, and nothing is computed anew
        for the backward pass."""
        import jax

        with (
            _PATCHING,
            mock.patch.object(jax.lax, "scan", self._scan(jax.lax.scan)),
            mock.patch.multiple(jax, remat=_as_it_is, checkpoint=_as_it_is),
        ):
            yield

    def _scan(self, original: Callable[..., Any]) -> Callable[..., Any]:
        import jax
        import jax.numpy as jnp

        def scan(
            f: Any,
            init: Any,
            xs: Any = None,
            length: Any = None,
            reverse: bool = False,
            **rest: Any,
        ) -> Any:
            stack = self._stack(jax.tree.leaves(xs))
            if stack is None:
                return original(f, init, xs, length, reverse, **rest)
            path, count = stack
            self.stacks[path] = count
            made = []
            for i in reversed(range(count)) if reverse else range(count):
                self._open.append((path, i))
                try:
                    init, y = f(init, jax.tree.map(lambda x, i=i: x[i], xs))
                finally:
                    self._open.pop()
                made.append(y)
            made = made[::-1] if reverse else made
            return init, jax.tree.map(lambda *y: jnp.stack(y), *made)

        return scan

    def _stack(self, arrays: list[Any]) -> tuple[str, int] | None:
        """Which module of the tree holds all values that are scanned over, and how many layers."""
        names = [n for n, v in self.values.items() if any(_is(x, v) for x in arrays)]
        if not names:
            return None
        parts = [n.split(".")[:-1] for n in names]
        common = []
        for words in zip(*parts, strict=False):
            if len(set(words)) > 1:
                break
            common.append(words[0])
        path = ".".join(common)
        inside = [v for n, v in self.values.items() if n.startswith(f"{path}.")]
        count = {v.shape[0] if v.ndim else 0 for v in inside}
        return (path, count.pop()) if path and len(count) == 1 and 0 not in count else None


def _is(x: Any, value: Any) -> bool:
    """Whether an array is this value, whoever wrapped it."""
    import jax

    if x is value:
        return True
    if not is_array(x) or not is_array(value) or x.shape != value.shape or x.ndim < 1:
        return False
    if any(isinstance(a, jax.core.Tracer) for a in (x, value)):
        return False
    return x.size > 1 and x.dtype == value.dtype and bool(np.array_equal(x, value))


def _as_it_is(f: Any = None, **options: Any) -> Any:
    return (lambda g: g) if f is None else f
