"""The levels above `bits`, for two sides of any origin, and where the two part if they differ."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np

from convert.compare.blind_inputs import by_masks, unexercised_inputs
from convert.compare.blind_values import unseen_values
from convert.compare.by_itself import DIVIDED
from convert.compare.flax_side import FlaxSide
from convert.compare.outputs import compare_runs
from convert.compare.report import Report
from convert.compare.sides import Side
from convert.compare.steps import compare_training
from convert.compare.torch_side import TorchSide
from convert.compare.trials import by_trial
from convert.diagnose.causes import found
from convert.diagnose.divergence import Divergence, Judged
from convert.judge.rows import Row
from convert.matching.pair import Pair
from convert.runtime.torch_module import train_norms

if TYPE_CHECKING:
    from convert.compare.settings import Settings

Mode = Literal["forward", "backward", "training"]


def compare_sides(
    reference: TorchSide,
    a: Side,
    b: Side,
    report: Report,
    options: Settings,
    pair: Callable[[], Pair],
    layers: Callable[[list[Row]], list[Row]] | None = None,
) -> None:
    """Fill `report` as far as its level asks for. `layers` judges layers by themselves, given the
    rows of the outputs. To be called inside `full_precision`."""
    backward = report.level in ("gradients", "training")
    rows, report.gradients, run = compare_runs(reference, a, b, backward=backward)
    report.outputs = _outputs_decide(rows)
    report.gradients, spots = by_masks(report.gradients, reference.call, reference.names)
    report.blind_spots += spots
    if layers is not None:
        report.layers = layers(report.outputs)
    name_layers(report, reference)
    compared = {row.name for row in rows}
    report.blind_spots += unseen_values(reference, run, compared, report.level)
    report.blind_spots += unexercised_inputs(reference.call, reference.names)
    if report.level == "training":
        if isinstance(b, FlaxSide):
            b.forced = reference.trains_norms()
        report.training = compare_training(reference, a, b, options.optimizers, options.steps)
        lost = [t for t in report.training if t.steps < options.steps]
        report.notices += [
            f"torch's own gradients are no numbers after {t.steps} steps of {t.optimizer}: "
            "only these are compared" for t in lost
        ]  # fmt: skip
    locate(report, pair, options.explain)
    if isinstance(b, FlaxSide):
        with contextlib.suppress(Exception):  # the divergence stands without a cause
            report.first_divergence = by_trial(report, reference, b, options)


def _outputs_decide(rows: list[Row]) -> list[Row]:
    """Where every output is the same, intermediates that are not were only paired wrongly: the
    layers of users' modules may end at different places."""
    made = [r for r in rows if r.name == "output" or r.name.startswith("output.")]
    if not made or not all(r.same for r in made):
        return rows
    return [r if r.same else dataclasses.replace(r, judged=False, note=DIVIDED) for r in rows]


def locate(report: Report, pair: Callable[[], Pair], seconds: float) -> None:
    """Say where the two part first, if they do; `seconds` at most go into a search for a cause."""
    levels: list[tuple[Mode, list[Row]]] = [
        ("forward", [*report.outputs, *report.layers]),
        ("backward", report.gradients),
        ("training", [row for t in report.training for row in t.rows]),
    ]
    bad = [mode for mode, rows in levels if any(row.judged and not row.same for row in rows)]
    where = bad[0] if bad else None
    if where == "forward":
        report.first_divergence = _not_finite(report.outputs)
    if where is not None and report.first_divergence is None:
        try:
            report.first_divergence = _first(pair(), where, seconds)
        except Exception as e:  # the verdict stands without it
            text = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
            report.notices.append(f"where they part could not be told: {text}")
    if report.first_divergence is None:
        report.first_divergence = weights_differ(report) or _first_row(levels)


def _not_finite(rows: list[Row]) -> Divergence | None:
    """The first value that torch itself makes NaN, or larger than float32 holds: nothing can be
    the same as that, and no layer of Flax's is at fault."""
    first = next((row for row in rows if row.judged and not row.same), None)
    if first is None or np.isfinite(first.noise):
        return None
    return Divergence.of(first.name, found("not_finite", name=first.name), first)


def _first_row(levels: list[tuple[Mode, list[Row]]]) -> Divergence | None:
    """The first row that differs, where no layer by itself does."""
    for mode, rows in levels:
        for row in rows:
            if row.judged and not row.same:
                what = {"forward": "", "backward": "the gradient of ", "training": "in training "}
                reason = found("unknown", "row", name=what[mode] + row.name)
                return Divergence.of(row.name, reason, row, direction=mode)
    return None


def _first(pair: Pair, mode: Mode, seconds: float) -> Divergence | None:
    from convert.diagnose.find import first_divergence

    if mode != "training":
        return first_divergence(pair, mode, seconds)
    torch = copy.deepcopy(pair.torch)
    parts = train_norms(torch)
    made = first_divergence(dataclasses.replace(pair, torch=torch), mode, seconds)
    # Without norms that train, the gradients have been judged: steps differ by something else.
    return None if made is not None and made.direction == "backward" and not parts else made


def weights_differ(report: Report) -> Divergence | None:
    """The layer of the first tensor that differs and is explained, else of the first that differs,
    where no run says more."""
    able = [d for d in report.differences if d.name != "config"]
    if not able:
        return None
    first = next((d for d in able if d.cause), able[0])
    name = first.name
    if not first.count:
        reason = found("unknown", "not compared", name=name, why=first.why)
    elif first.diagnosis:
        reason = found("weights", "explained", name=name, why=first.why, reason=first.diagnosis)
    else:
        reason = found("weights", name=name, why=first.why)
    measured = Judged(first.max_error or 0.0, 0.0, 0.0, "float32")
    made = Divergence.of(name.rpartition(".")[0], reason, measured, tensor=name)
    return dataclasses.replace(made, cause=first.cause or made.cause)


def name_layers(report: Report, reference: TorchSide) -> None:
    """The type of the layer that made each row, where the row is named after a layer."""
    types = {n: type(m).__name__ for n, m in reference.module.named_modules() if n}

    def layer(name: str) -> str:
        while name and name not in types:
            name = name.rpartition(".")[0]
        return types.get(name, "")

    def named(rows: list[Row], of: Callable[[str], str]) -> list[Row]:
        return [dataclasses.replace(row, layer=row.layer or of(row.name)) for row in rows]

    report.outputs = named(report.outputs, lambda name: types.get(name, ""))
    report.layers = named(report.layers, lambda name: types.get(name, ""))
    report.gradients = named(report.gradients, layer)
