"""Which norms of a Flax module move their statistics when it trains as its users train it.

Comparing training needs norms in train mode and nothing else: no dropout, no other outputs. So they
are put into it one by one, but for those that stay in eval mode however the model is told to train.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from convert.runtime.fitting import EVALUATION

_SWITCHES = {name: value for name, value in EVALUATION.items() if isinstance(value, bool)}
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def switched(owner: Any, args: Any, kwargs: Any, training: bool) -> Arguments:
    """The arguments of a call of `owner` with every switch that it has as in training, or not."""
    signature = inspect.signature(type(owner).__call__)
    given = signature.bind(owner, *args, **kwargs)
    for name, value in _SWITCHES.items():
        if name in signature.parameters:
            given.arguments[name] = value != training
    return given.args[1:], given.kwargs


def switches_of(owner: Any) -> dict[str, bool]:
    """The switches that `owner` has as attributes, as in training."""
    return {n: not v for n, v in _SWITCHES.items() if isinstance(vars(owner).get(n), bool)}


def trains(layer: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call of a norm is one in training, by its argument or else its attribute."""
    given = inspect.signature(type(layer).__call__).bind(layer, *args, **kwargs)
    given.apply_defaults()
    for held in (given.arguments, vars(layer)):
        told = {name: held.get(name) for name in _SWITCHES}
        for name, value in told.items():
            if isinstance(value, bool):
                return value != _SWITCHES[name]
    return True


class Modes:
    """The norms of one run by path, as `around` sees them."""

    def __init__(self) -> None:
        self._trained: dict[str, bool] = {}

    def __call__(self, path: str, part: Any, proceed: Any, args: Any, kwargs: Any) -> Any:
        """An `Around` that changes nothing."""
        if keeps(part):
            told = trains(part, args, kwargs)
            self._trained[path] = told or self._trained.get(path, False)
        return proceed(*args, **kwargs)

    def still(self, forced: bool) -> frozenset[str]:
        """Those in eval mode; where all are, the model has no switch, and with `forced` none is."""
        if forced and not any(self._trained.values()):
            return frozenset()
        return frozenset(path for path, told in self._trained.items() if not told)


def keeps(layer: Any) -> bool:
    """Whether an NNX module, or a linen one that is being called, has running statistics of its
    own, not only parts that have."""
    from flax import linen, nnx

    if isinstance(layer, linen.Module):
        held = layer.variables.get("batch_stats", {})
        return any(not isinstance(value, Mapping) for value in held.values())
    return any(isinstance(v, nnx.BatchStat) for v in vars(layer).values())
