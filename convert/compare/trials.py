"""Causes that only another run of both sides tells, where the walks name none.

A gradient at a point where there is none: both sides are run where the inputs lie a little beside.
Two parameters of torch's that are one in Flax: torch is trained with one of them held fixed.
Norms that the model does not tell to train: Flax is trained with them too.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses

import numpy as np

from convert.compare.backward_by_values import parted
from convert.compare.blind_spots import listed
from convert.compare.differentiated import Place
from convert.compare.flax_side import FlaxSide
from convert.compare.report import Report
from convert.compare.settings import Settings
from convert.compare.steps import compare_training
from convert.compare.stopped import stopped
from convert.compare.torch_side import TorchSide
from convert.diagnose.causes import Reason, found
from convert.diagnose.divergence import Divergence
from convert.judge.noise import EXACT, gap, largest
from convert.runtime.call import Call
from convert.runtime.torch_calls import trace_torch

_ASIDE = 2.0**-12  # of the largest value


def by_trial(
    report: Report, reference: TorchSide, flax: FlaxSide, options: Settings
) -> Divergence | None:
    """The report's first divergence, with its cause where it has none and a trial tells it; with
    another one where that explains every gradient."""
    first = report.first_divergence
    if first is not None and first.cause == "tied":  # which a stopped gradient would explain too
        return first
    if first is not None and first.direction == "backward" and options.explain:
        with contextlib.suppress(Exception):  # likewise
            if (reason := _compiled(report, reference, flax)) is not None:
                return _of_reason(first, reason)
        with contextlib.suppress(Exception):  # what was found stands
            if (place := stopped(report, reference, flax, options.explain)) is not None:
                if (root := _root(report, flax)) is not None:
                    return _of_reason(first, root)
                return _at(first, place)
        first = _of_a_row(report, first)
    if first is None or first.cause != "unknown":
        return first
    if first.direction == "backward" and options.explain:
        with contextlib.suppress(Exception):  # what was found stands
            first = _at(first, parted(reference, flax))
    reason, layer = _not_told(reference, flax, options.steps)
    if reason is None and first.direction == "backward":
        reason, layer = _kink(report, reference, flax), _taking(report, reference)
    elif reason is None and first.direction == "training":
        reason, layer = _summed(reference, flax, options.steps)
    if reason is None:
        return first
    if layer is not None:
        first = dataclasses.replace(first, layer=layer, between=None)
    return _of_reason(first, reason)


def _at(first: Divergence, place: Place | None) -> Divergence:
    if place is None:
        return first
    made = _of_reason(first, place.reason)
    return dataclasses.replace(
        made, layer=place.module, between=None, source=place.source, tensor=None
    )


def _of_reason(first: Divergence, reason: Reason) -> Divergence:
    return dataclasses.replace(
        first, cause=reason.cause, diagnosis=reason.diagnosis, advice=reason.advice
    )


def _of_a_row(report: Report, first: Divergence) -> Divergence:
    """The divergence, without its cause where it is of a gradient that is the same after all, or
    nothing but rounding."""
    row = next((r for r in report.gradients if r.name == first.tensor), None)
    if row is None or (row.judged and not row.same) or first.cause == "unknown":
        return first
    wrong = next((r for r in report.gradients if r.judged and not r.same), None)
    if wrong is None:
        return first
    reason = found("unknown", "row", name=f"the gradient of {wrong.name}")
    return Divergence.of(wrong.name.rpartition(".")[0], reason, wrong, direction="backward")


def _compiled(report: Report, reference: TorchSide, flax: FlaxSide) -> Reason | None:
    """Gradients that are torch's where Flax's operations are run one by one. XLA on the CPU may
    compute a maximum's operand a second time, rounded otherwise, and then finds no maximum there.
    """
    names = _wrong(report)
    if not names or "float64" not in reference.precisions or "float64" not in flax.precisions:
        return None
    if (run := flax.one_by_one("float64")) is None:
        return None
    ours, theirs = reference.run("float64", backward=True).gradients, run.gradients
    if any(gap(ours[n], theirs[n]) > EXACT * largest(ours[n]) for n in names):
        return None
    return found("compiled", names=", ".join(n.removeprefix("in.") for n in names))


def _kink(report: Report, reference: TorchSide, flax: FlaxSide) -> Reason | None:
    """Gradients that Flax has not at these inputs, or that agree a little beside them."""
    if (root := _root(report, flax)) is not None:
        return root
    names = _wrong(report)
    if not names or "float64" not in reference.precisions or "float64" not in flax.precisions:
        return None
    sides = _aside(reference, flax)
    ours, theirs = (side.run("float64", backward=True).gradients for side in sides)
    if any(gap(ours[n], theirs[n]) > EXACT * largest(ours[n]) for n in names):
        return None
    return found("kink", names=", ".join(n.removeprefix("in.") for n in names), aside=_ASIDE)


def _taking(report: Report, reference: TorchSide) -> str | None:
    """The first layer that takes an input of the model whose gradient differs, where no gradient
    of a parameter does."""
    names = _wrong(report)
    if not all(n.startswith("in.") for n in names):
        return None
    paths = {f"in.{name}": path for path, name in reference.names.items()}
    arrays = [reference.call.arrays()[paths[n]] for n in names]
    calls = trace_torch(reference.module, reference.call).calls
    taking = (
        c.name
        for c in calls
        for x in c.inputs.values()
        if c.name and any(np.array_equal(x, y.astype(x.dtype)) for y in arrays)
    )
    return next(taking, None)


def _wrong(report: Report) -> list[str]:
    return [r.name for r in report.gradients if r.judged and not r.same]


def _root(report: Report, flax: FlaxSide) -> Reason | None:
    """Gradients that are no numbers in Flax."""
    rough = flax.run("float32", backward=True).gradients
    for name in _wrong(report):
        if count := int(np.isnan(rough[name]).sum()):
            size = rough[name].size
            return found("kink", "root", name=name.removeprefix("in."), count=count, size=size)
    return None


def _aside(reference: TorchSide, flax: FlaxSide) -> tuple[TorchSide, FlaxSide]:
    """Both with other inputs close by."""
    generator = np.random.default_rng(0)
    paths = {name: path for path, name in flax.inputs.items()}
    ours, theirs = {}, {}
    for path, x in reference.call.arrays().items():
        if x.dtype.kind == "f" and (name := reference.names[path]) in paths:
            moved = x + _ASIDE * largest(x) * generator.standard_normal(x.shape)
            ours[path] = moved.astype(x.dtype)
            theirs[paths[name]] = flax.axes.to_flax(name, ours[path])
    made = copy.copy(reference), copy.copy(flax)
    made[0].call = Call(*reference.call.replaced(ours))
    made[1].call = Call(*flax.call.replaced(theirs))
    return made


def _not_told(reference: TorchSide, flax: FlaxSide, steps: int) -> tuple[Reason | None, str | None]:
    """Norms that stay in eval mode, where all is the same once they train, but for how the
    variance of a batch is counted, which changes no step; and torch's name of the first."""
    if not (idle := flax.still_norms()):
        return None, None
    still, layers = reference.still_norms(), _layers(flax)
    frozen = frozenset(path for path, layer in layers.items() if layer in still)
    names = [path for path in layers if path in idle - frozen]
    if not names:
        return None, None
    trained = flax.with_still_norms(frozen)
    (training,) = compare_training(reference, reference, trained, ("SGD",), steps)
    rows = [r for r in training.rows if r.judged and not r.name.endswith("running_var")]
    if not all(row.same for row in rows):
        return None, None
    return found("batch_statistics", "still", names=listed(names)), layers[names[0]]


def _layers(flax: FlaxSide) -> dict[str, str]:
    """Flax's layers, by path, and the torch layers whose tensors they hold."""
    return {
        name.rpartition(".")[0]: match.torch[0].rpartition(".")[0]
        for match in flax.matches
        for name in match.flax
    }


def _summed(reference: TorchSide, flax: FlaxSide, steps: int) -> tuple[Reason | None, str | None]:
    """A recurrent layer's two biases, each of which torch trains, and which Flax holds as their
    sum; and the first such layer."""
    second = {n for n in reference.combined if "bias_hh" in n}
    if not second or not {n.replace("bias_hh", "bias_ih") for n in second} <= reference.combined:
        return None, None
    held = copy.copy(reference)
    held.held = frozenset(second)
    (training,) = compare_training(held, held, flax, ("SGD",), steps)
    if not all(row.same for row in training.rows if row.judged):
        return None, None
    name = min(second)
    first = name.replace("bias_hh", "bias_ih")
    return found("bias_sum", "trained", name=first, other=name), name.rpartition(".")[0]
