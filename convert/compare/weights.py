"""Weights of two checkpoints, both mapped to the canonical layout and compared bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from convert.compare.report import Report
from convert.judge.bits import TensorDifference, compare
from zoo.checkpoint.plan import Made, Plan, check_ties, read_step
from zoo.checkpoint.progress import Progress
from zoo.containers.base import Reader, TensorInfo

_Values = Callable[[], list[np.ndarray]]


def compare_bits(
    a: tuple[Reader, Plan], b: tuple[Reader, Plan], report: Report, progress: Progress
) -> None:
    """Add every tensor in which the two differ to `report`. Both plans lead to the torch tree."""
    for title, (reader, plan) in zip((report.a, report.b), (a, b), strict=True):
        for name in check_ties(reader, plan):
            report.differences.append(
                TensorDifference(name, f"in {title} it is not the tensor that it is tied to")
            )
    sources = [_sources(*a), _sources(*b)]
    firsts = [{names[0]: names for names in side} for side in sources]
    total = sum(s.nbytes for s in a[1].steps)
    for group in _groups(*sources):
        read: list[dict[str, np.ndarray]] = [{}, {}]
        for side, first, values_of in zip(read, firsts, sources, strict=True):
            for names in (first[n] for n in group if n in first):
                side |= zip(names, values_of[names](), strict=True)
        for name in group:
            values = [r[name] if name in r else _stated(a[1], name) for r in read]
            for title, value in zip((report.a, report.b), values, strict=True):
                if value is None:
                    report.differences.append(TensorDifference(name, f"not in {title}"))
            x, y = values
            if x is None or y is None:
                continue
            difference = compare(name, x, y)
            report.differences += [difference] if difference else []
            report.compared += 1
            report.nbytes += x.nbytes
        progress("bits", report.nbytes, total)


def _groups(*sides: dict[tuple[str, ...], _Values]) -> list[list[str]]:
    """Canonical names, those together that one side joins: a stack that holds a tensor of each
    layer is read once."""
    groups: dict[str, list[str]] = {}
    for names in dict.fromkeys(n for side in sides for n in side):
        joined = list(dict.fromkeys(n for name in names for n in groups.get(name, [name])))
        groups |= dict.fromkeys(joined, joined)
    return list({id(group): group for group in groups.values()}.values())


def _sources(reader: Reader, plan: Plan) -> dict[tuple[str, ...], _Values]:
    """Canonical names -> how to get their values from this side. Without the prefix that a head
    brings, so that an encoder is compared with the same encoder under a head."""

    def bare(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(n.removeprefix(plan.prefix) for n in names)

    found: dict[tuple[str, ...], _Values] = {
        bare(step.names): partial(read_step, reader, step) for step in plan.steps
    }
    return found | {bare((m.name,)): partial(_made, m) for m in plan.made}


def _stated(plan: Plan, name: str) -> np.ndarray | None:
    """The value that the layout states for a tensor that one side does not hold, if it does."""
    for entry in plan.layout.entries:
        if entry.constant is not None and name == entry.torch[0].name.removeprefix(plan.prefix):
            info = TensorInfo(entry.constant.dtype, entry.torch[0].shape)
            return Made(name, info, entry.constant, None).value()
    return None


def _made(made: Made) -> list[np.ndarray]:
    return [made.value()]
