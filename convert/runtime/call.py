"""The arguments of a forward pass, and the arrays among them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convert.runtime.arrays import dtype_in, is_inexact, leaves, replaced


@dataclass(frozen=True)
class Call:
    """Arguments of a forward pass, as NumPy arrays or plain values."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays among the arguments: "0", "1.0" (in the second), "mask"."""
        return leaves(self._tree())

    def replaced(self, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """args and kwargs with other values at the paths of `arrays`."""
        tree = replaced(self._tree(), values)
        args = tuple(tree[str(i)] for i in range(len(self.args)))
        return args, {k: tree[k] for k in self.kwargs}

    def cast(self, precision: str) -> Call:
        """The same with floating-point arrays in `precision`."""
        return Call(*self.replaced({k: cast(x, precision) for k, x in self.arrays().items()}))

    def names(self, forward: Callable[..., Any]) -> dict[str, str]:
        """What each of `arrays` is called: positional ones by the parameter they are given to."""
        try:
            parameters = [
                p.name
                for p in inspect.signature(forward).parameters.values()
                if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
            ]
        except (TypeError, ValueError):
            parameters = []
        names = {}
        for path in self.arrays():
            first, dot, rest = path.partition(".")
            if first.isdigit() and int(first) < len(parameters):
                first = parameters[int(first)]
            names[path] = first + dot + rest
        return names

    def _tree(self) -> dict[str, Any]:
        return {str(i): a for i, a in enumerate(self.args)} | dict(self.kwargs)


def cast(array: np.ndarray, precision: str) -> np.ndarray:
    """A floating-point or complex array in `precision`; any other as it is."""
    return array.astype(dtype_in(array, precision)) if is_inexact(array) else array
