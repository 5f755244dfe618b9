"""Gradients of one scalar loss with respect to every parameter and floating-point input."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from convert.compare.sides import Run, exact
from convert.compare.summed_rows import ExactSums
from convert.judge.noise import Arrays, Noise, judge, largest
from convert.judge.rows import FLOOR, Row

NO_GRADIENT = "no true gradient: in float32 it is nothing but rounding"
_Two = tuple[np.ndarray, np.ndarray | None]


def judge_gradients(
    reference: Mapping[str, Run],
    a: Mapping[str, Run],
    b: Mapping[str, Run],
    rerun: Callable[[str, int], Arrays],
    sums: ExactSums | None = None,
) -> list[Row]:
    """A row a parameter, then one an input; those that one side lacks have none.

    Where float64 itself is, on both sides, no larger than float32's noise, there is no gradient to
    compare: a bias before BatchNorm, the key's bias of an attention.
    """
    gradients = exact(reference).gradients
    # A gradient of any size owes its error to a few roundings behind it: one run's may be small.
    noise = Noise(gradients, rerun, exact64="float64" in reference, chaotic=True)
    greatest = max((largest(g) for g in gradients.values()), default=0.0)
    rows = []
    for name in gradients:
        if not all(name in side["float32"].gradients for side in (a, b)):
            continue
        of_a, of_b, of_reference = (_pair(side, name) for side in (a, b, reference))
        row = noise.again(judge(name, of_a, of_b, of_reference))
        row = row if sums is None else sums.again(row, of_a, of_b)
        size = max(largest(exact(side).gradients[name]) for side in (a, b))
        if not row.same and row.noise < size <= FLOOR * greatest:
            row = dataclasses.replace(row, noise=max(row.noise, noise.of(name)))
        if 0 < size <= row.noise:
            row = dataclasses.replace(row, judged=False, note=NO_GRADIENT)
        rows.append(row)
    return rows


def _pair(runs: Mapping[str, Run], name: str) -> _Two:
    rough = runs["float32"].gradients[name]
    return rough, runs["float64"].gradients[name] if "float64" in runs else None
