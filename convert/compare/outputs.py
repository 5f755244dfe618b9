"""Outputs and intermediates of two models, judged by what rounding explains.

The reference is the PyTorch side with the weights of A, run in float32 and in float64; the gap
between the two is the noise. Nothing is compared with a tolerance that somebody chose.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np

from convert.compare.gradients import judge_gradients
from convert.compare.sides import Run, Side, exact
from convert.compare.summed_rows import ExactSums
from convert.compare.torch_side import TorchSide
from convert.compare.twins import twin
from convert.judge.noise import Arrays, Noise, judge
from convert.judge.rows import Row
from convert.runtime.precision import full_precision
from zoo.model import Config, Model

Runs = Mapping[str, Run]  # by precision; without float64 where the module cannot be run in it


def compare_runs(
    reference: TorchSide, a: Side, b: Side, *, backward: bool
) -> tuple[list[Row], list[Row], Run]:
    """Rows for outputs and intermediates, and for gradients if they are wanted; and the reference's
    most precise run.

    `reference` is `a` where that is of PyTorch. To be called inside `full_precision`.
    """

    def every(side: Side) -> Runs:
        return {p: side.run(p, backward=backward) for p in side.precisions}

    of_reference = every(reference)
    of_a = of_reference if a is reference else every(a)
    of_b = every(b)

    @functools.cache
    def rerun(precision: str, i: int) -> Run:
        return reference.shaken(i).run(precision, backward=backward)

    combined = bool(reference.combined)
    sums = ExactSums(a, b, everything, backward=backward)
    rows = judge_outputs(
        of_reference, of_a, of_b, lambda p, i: everything(rerun(p, i)), combined, sums
    )
    if not backward:
        return rows, [], exact(of_reference)
    sums = ExactSums(a, b, lambda run: run.gradients, backward=True)
    gradients = judge_gradients(of_reference, of_a, of_b, lambda p, i: rerun(p, i).gradients, sums)
    return rows, gradients, exact(of_reference)


def judge_outputs(
    reference: Runs,
    a: Runs,
    b: Runs,
    rerun: Callable[[str, int], Arrays],
    combined: bool = False,
    sums: ExactSums | None = None,
) -> list[Row]:
    """The rows in the reference's order of execution. `combined`: float64 has a noise too, as
    parameters may have been combined in float32."""
    noise = Noise(everything(exact(reference)), rerun, exact64=combined)
    rows = []
    for name in _common(reference, a, b):
        of_a, of_b, of_reference = (_pair(side, name) for side in (a, b, reference))
        row = noise.again(judge(name, of_a, of_b, of_reference))
        rows.append(row if sums is None else sums.again(row, of_a, of_b))
    return rows


def everything(run: Run) -> Arrays:
    """Intermediates in the order of execution, then outputs."""
    return {**run.intermediates, **run.outputs}


def _common(reference: Runs, *others: Runs) -> list[str]:
    """Every output of the reference, after the intermediates that all sides have."""
    runs = [run for side in others for run in side.values()]
    met = [n for n in exact(reference).intermediates if all(n in r.intermediates for r in runs)]
    return [*met, *exact(reference).outputs]


def _pair(runs: Runs, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    missing = np.zeros((0,))
    rough = everything(runs["float32"]).get(name, missing)
    return rough, everything(runs["float64"]).get(name, missing) if "float64" in runs else None


def compare_outputs(
    model: Model,
    config: Config,
    a: tuple[str, Mapping[str, np.ndarray]],
    b: tuple[str, Mapping[str, np.ndarray]],
) -> list[Row]:
    """One row for each output and each common intermediate of two twins. `a` and `b` are
    (framework, canonical tensors)."""
    with full_precision():
        side_a = twin(model, config, *a)
        reference = side_a if isinstance(side_a, TorchSide) else twin(model, config, "torch", a[1])
        assert isinstance(reference, TorchSide)
        return compare_runs(reference, side_a, twin(model, config, *b), backward=False)[0]


def run(
    model: Model,
    config: Config,
    framework: str,
    canonical: Mapping[str, np.ndarray],
    inputs: Mapping[str, np.ndarray],
    precision: str,
) -> Arrays:
    """Outputs and intermediates of one twin in eval mode, run in `precision`, as float64."""
    with full_precision():
        found = twin(model, config, framework, canonical, inputs=inputs)
        outputs = everything(found.run(precision, backward=False))
    return {k: v.astype(np.float64) for k, v in outputs.items()}
