"""A few steps of an optimizer from the same state on the same batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.compare.gradients import NO_GRADIENT
from convert.compare.report import Training
from convert.compare.settings import OPTIMIZERS
from convert.compare.sides import Optimizer, Side, Trained, exact
from convert.compare.torch_side import TorchSide
from convert.judge.noise import Arrays, Noise, gap, judge
from convert.judge.rows import Row
from zoo.containers.errors import MissingExtra, UsageError

RATE = 1e-3
_DECAY = 0.01
_GROWN = 4.0  # times as far may steps in float32 part that are the same in float64

Runs = Mapping[str, Trained]  # by precision


def optimizer(name: str, rate: float = RATE) -> Optimizer:
    """One rule in both libraries, with every constant given: their defaults differ."""
    try:
        import optax
    except ImportError:
        raise MissingExtra("comparing training", "flax") from None
    import torch

    adam = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
    torch_adam: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}
    found = {
        "SGD": Optimizer(
            name, rate, lambda p: torch.optim.SGD(p, lr=rate), lambda: optax.sgd(rate)
        ),
        "momentum": Optimizer(
            name,
            rate,
            lambda p: torch.optim.SGD(p, lr=rate, momentum=0.9),
            lambda: optax.sgd(rate, momentum=0.9),
        ),
        "Adam": Optimizer(
            name,
            rate,
            lambda p: torch.optim.Adam(p, lr=rate, **torch_adam),
            lambda: optax.adam(rate, **adam),
        ),
        "AdamW": Optimizer(
            name,
            rate,
            lambda p: torch.optim.AdamW(p, lr=rate, weight_decay=_DECAY, **torch_adam),
            lambda: optax.adamw(rate, weight_decay=_DECAY, **adam),
        ),
    }
    if name not in found:
        raise UsageError(f"there is no optimizer {name!r}", f"known are {', '.join(OPTIMIZERS)}")
    return found[name]


def compare_training(
    reference: TorchSide, a: Side, b: Side, names: tuple[str, ...], steps: int
) -> list[Training]:
    """One record an optimizer. To be called inside `full_precision`."""
    return [_compare(reference, a, b, optimizer(name), steps) for name in names]


def _compare(reference: TorchSide, a: Side, b: Side, rule: Optimizer, steps: int) -> Training:
    def every(side: Side) -> Runs:
        return {p: side.train(p, rule, steps) for p in side.precisions}

    of_reference = every(reference)
    if 0 < (finite := min(_finite(t) for t in of_reference.values())) < steps:
        return _compare(reference, a, b, rule, finite)  # torch itself gets lost after these
    of_a = of_reference if a is reference else every(a)
    of_b = every(b)
    names = exact(of_reference).gradients[0]
    untrained = {name: _untrained(of_reference, name) for name in names}

    def seen(trained: Trained) -> Arrays:
        """The losses, and of every tensor what its gradients moved."""
        state = {
            name: x[~untrained[name]] if name in untrained else x
            for name, x in trained.state.items()
        }
        return {"loss": np.array(trained.losses), **state}

    visible = [{p: seen(t) for p, t in runs.items()} for runs in (of_a, of_b, of_reference)]
    wanted = exact(visible[2])
    noise = Noise(
        wanted,
        lambda precision, i: seen(reference.shaken(i).train(precision, rule, steps)),
        exact64="float64" in reference.precisions,
        chaotic=True,
        grown=_GROWN,
    )
    rows = []
    for name in wanted:
        if all(name in side["float32"] for side in visible):
            x, y, z = ((side["float32"][name], _in64(side, name)) for side in visible)
            row = noise.again(judge(name, x, y, z))
            rows.append(_told(row, untrained.get(name)))
    losses = {
        f"{title} {p}": runs[p].losses for title, runs in (("a", of_a), ("b", of_b)) for p in runs
    }
    return Training(rule.name, steps, rule.rate, losses, rows)


def _finite(trained: Trained) -> int:
    """The steps before the first one whose gradients are no numbers."""
    good = (all(np.isfinite(g).all() for g in step.values()) for step in trained.gradients)
    return next((i for i, fine in enumerate(good) if not fine), len(trained.gradients))


def _in64(side: Mapping[str, Arrays], name: str) -> np.ndarray | None:
    return side["float64"][name] if "float64" in side else None


def _untrained(reference: Runs, name: str) -> np.ndarray:
    """Which elements of a parameter rounding moves, and not a gradient: at some step float64 is no
    larger than float32's noise there, the largest of the tensor. Without float64 none is known."""
    steps = zip(reference["float32"].gradients, exact(reference).gradients, strict=True)
    found: Any = False
    for rough, precise in steps:
        x = precise[name]
        found = found | ((np.abs(x) <= gap(rough[name], x)) & (x != 0))
    return np.asarray(found)


def _told(row: Row, untrained: np.ndarray | None) -> Row:
    """The row, saying what of the tensor it does not compare."""
    if untrained is None or not untrained.any():
        return row
    row = dataclasses.replace(row, shape=tuple(untrained.shape))
    if untrained.all():
        return dataclasses.replace(row, judged=False, note=NO_GRADIENT)
    told = f"{untrained.sum()} of {untrained.size} elements have no true gradient: not compared"
    note = f"{row.note}; {told}" if row.note else told
    return dataclasses.replace(row, note=note)
