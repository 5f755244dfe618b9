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
    total = sum(s.nbytes for s in a[1].steps)
    for names in dict.fromkeys((*sources[0], *sources[1])):
        read = [s.get(names) or _stated(a[1], names) for s in sources]
        for title, values in zip((report.a, report.b), read, strict=True):
            if values is None:
                report.differences += [TensorDifference(n, f"not in {title}") for n in names]
        if read[0] is None or read[1] is None:
            continue
        for name, x, y in zip(names, read[0](), read[1](), strict=True):
            difference = compare(name, x, y)
            report.differences += [difference] if difference else []
            report.compared += 1
            report.nbytes += x.nbytes
        progress("bits", report.nbytes, total)


def _sources(reader: Reader, plan: Plan) -> dict[tuple[str, ...], _Values]:
    """Canonical names -> how to get their values from this side. Without the prefix that a head
    brings, so that an encoder is compared with the same encoder under a head."""

    def bare(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(n.removeprefix(plan.prefix) for n in names)

    found: dict[tuple[str, ...], _Values] = {
        bare(step.names): partial(read_step, reader, step) for step in plan.steps
    }
    return found | {bare((m.name,)): partial(_made, m) for m in plan.made}


def _stated(plan: Plan, names: tuple[str, ...]) -> _Values | None:
    """The value that the layout states for a tensor that one side does not hold, if it does."""
    for entry in plan.layout.entries:
        name = entry.torch[0].name.removeprefix(plan.prefix)
        if entry.constant is not None and names == (name,):
            info = TensorInfo(entry.constant.dtype, entry.torch[0].shape)
            return partial(_made, Made(names[0], info, entry.constant, None))
    return None


def _made(made: Made) -> list[np.ndarray]:
    return [made.value()]
