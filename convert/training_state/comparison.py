"""Training states of two checkpoints, compared bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from convert.judge.bits import TensorDifference, compare
from convert.training_state.data import listed
from convert.training_state.state import OptimizerState, TrainingState
from convert.training_state.summary import line, summary

_ALIKE = {"Adam", "AdamW", "RAdam"}  # their states are, and optax's do not say which it is


@dataclass
class StateComparison:
    """Where two training states differ, and what a user should know besides."""

    differences: list[TensorDifference] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def compare_training(
    a: TrainingState, b: TrainingState, titles: tuple[str, str]
) -> StateComparison:
    """Where the optimizers and averages of the two differ. `titles` are what they are called.

    What only one of the two has is told as a notice, and so is data that differs: neither makes
    another model.
    """
    found = StateComparison()
    for what, has in (("an optimizer", _optimizers), ("averaged weights", _averages)):
        if has(a) and has(b):
            continue
        for title, state in zip(titles, (a, b), strict=True):
            if has(state):
                found.notices.append(f"only {title} holds {what}: {line(summary(state))}")
    if a.optimizers and b.optimizers:
        found.differences += _of_optimizers(a, b, titles)
        moments = sum(len(arrays) for o in a.optimizers for arrays in o.slots.values())
        found.notices.append(f"the optimizers were compared too: {moments} moments")
    if a.ema and b.ema:
        found.differences += _of_arrays("ema", a.ema, b.ema, titles)
        found.notices.append(f"the averaged weights were compared too: {len(a.ema)} tensors")
    for name in a.data.keys() & b.data.keys():
        if a.data[name] != b.data[name]:
            found.notices.append(f"{name} is {a.data[name]!r} and {b.data[name]!r}")
    return found


def _optimizers(state: TrainingState) -> bool:
    return bool(state.optimizers)


def _averages(state: TrainingState) -> bool:
    return bool(state.ema)


def _of_optimizers(
    a: TrainingState, b: TrainingState, titles: tuple[str, str]
) -> Iterator[TensorDifference]:
    left, right = ({o.name: o for o in state.optimizers} for state in (a, b))
    for name in dict.fromkeys((*left, *right)):
        title = f"optimizer {name}" if name else "optimizer"
        if name not in left or name not in right:
            missing = titles[name in left]
            yield TensorDifference(title, f"not in {missing}")
            continue
        x, y = left[name], right[name]
        if x.rule != y.rule and not {x.rule, y.rule} <= _ALIKE:
            yield TensorDifference(title, f"{x.rule} and {y.rule}")
            continue
        yield from _of_numbers(title, x, y)
        for slot in dict.fromkeys((*x.slots, *y.slots)):
            pair = x.slots.get(slot, {}), y.slots.get(slot, {})
            yield from _of_arrays(f"{title}: {slot}", *pair, titles)


def _of_numbers(title: str, x: OptimizerState, y: OptimizerState) -> Iterator[TensorDifference]:
    """Steps, where both count them, and options that both tell."""
    for name in x.steps.keys() & y.steps.keys():
        if x.steps[name] != y.steps[name]:
            yield TensorDifference(
                f"{title}: step.{name}", f"{x.steps[name]} and {y.steps[name]} updates"
            )
    options = [{n: g.options for g in o.groups for n in g.params} for o in (x, y)]
    for name in options[0].keys() ^ options[1].keys():
        yield TensorDifference(f"{title}: {name}", "is trained in one of the two only")
    told = set()
    for name in options[0].keys() & options[1].keys():
        first, second = options[0][name], options[1][name]
        for key in first.keys() & second.keys():
            values = listed(first[key]), listed(second[key])
            if None not in values and values[0] != values[1] and (key, str(values)) not in told:
                told.add((key, str(values)))
                yield TensorDifference(f"{title}: {key}", f"{values[0]!r} and {values[1]!r}")


def _of_arrays(
    title: str, a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], titles: tuple[str, str]
) -> Iterator[TensorDifference]:
    for name in dict.fromkeys((*a, *b)):
        for side, arrays in zip(titles, (a, b), strict=True):
            if name not in arrays:
                yield TensorDifference(f"{title}.{name}", f"not in {side}")
        if name in a and name in b and (d := compare(f"{title}.{name}", a[name], b[name])):
            yield d
