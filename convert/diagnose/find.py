"""The first place at which two modules part."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Literal

import numpy as np

from convert.diagnose.backward import first_backward
from convert.diagnose.divergence import Divergence
from convert.diagnose.explain import Explainer
from convert.diagnose.matched import Helps, Matched
from convert.diagnose.reference import Reference
from convert.diagnose.repair.problem import (
    Runs,
    repair,
    repair_onward,
    rounding,
    with_statistics,
)
from convert.diagnose.statistics import running_statistics
from convert.diagnose.unseen import first_unseen
from convert.diagnose.walk import Event, Forward
from convert.matching.effect import helps
from convert.matching.pair import Pair
from convert.matching.pairing import Pairing, pair_traces
from convert.runtime.flax_calls import record
from convert.runtime.flax_module import flax_module
from convert.runtime.torch_module import norms
from convert.runtime.torch_recurrent import is_single, whole

LOG = logging.getLogger(__name__)
Mode = Literal["forward", "backward", "training"]
# Causes by which Flax has one operation less: it may come later instead.
_PASSED_BY = ("missing_layer", "operand")
_SLIGHT = 1e-5  # of a value's scale, in float32


def first_divergence(pair: Pair, mode: Mode = "forward", seconds: float = 0.0) -> Divergence | None:
    """The first place at which the two modules part, and why; None where they do not.

    Flax runs with torch's own values put in at every paired layer, so that no error is carried on:
    each value is judged by the rounding noise of its own step, in float32, and where nothing is
    found there, in float64 for the causes that can be named (an epsilon too small to show).
    "backward" then does the same with cotangents: gradients of each layer's inputs and parameters.
    Where no known cause fits, torch's own computation is changed until it gives Flax's values, for
    `seconds` at most; 0: not at all.

    "training" looks at running statistics besides: torch's norms must be in train mode for it,
    Flax's are put into it.

    Both modules are run as they are, in copies: modes, states and generators stay. UsageError where
    `pair.layers` names what there is not, or where the Flax module is not bound.
    """
    reference = Reference(pair.torch, pair.call, "float32")
    side = flax_module(pair.flax, "float32", training=mode == "training")
    side.forced = _trains(pair)
    trace = record(side, pair.flax_call)
    pairing = pair_traces(pair, reference.trace, side, trace)
    reference.step(pairing.of_torch())

    def helping(values: Mapping[str, np.ndarray]) -> tuple[int, float]:
        if pairing.tensors_left[1]:  # not all can be put right: that it does not help says nothing
            return 1, 0.0
        return helps(reference.trace, side, pair.flax_call, values, trace)

    matched = Matched(pair.torch, side, pairing.matches, helping)
    matched.wrong()  # before the walk, as it may run Flax
    explain = Explainer(reference, side, pairing, matched, False)
    walk = Forward(reference, side, pairing, explain)
    found: Divergence | None = walk.run(pair.flax_call)
    if found is None and explain.weak is not None:
        explain.first, found = explain.weak, explain.weak[1]
    if mode == "training":  # also where the forward pass is within float32's noise
        moved = _moved_in_float64(pair, pairing, helping)
        if moved is not None:
            return _as_written(moved, reference)
    if mode == "backward" and found is not None and found.cause == "unknown" and _is_slight(found):
        silent = Forward(reference, side, pairing, lambda event: None)
        silent.run(pair.flax_call)
        back = first_backward(pair, reference, side, silent, matched)
        if back is not None:
            return _as_written(back, reference)
    found = _repaired(pair, _nearer(pair, found, explain), explain, seconds)
    if found is None and mode == "forward" and not reference.random:
        found = _in_float64(pair, pairing, helping, seconds)
    if found is None and mode == "training":
        found = running_statistics(reference, walk, matched)
    if found is None and mode != "forward":
        found = first_backward(pair, reference, side, walk, matched)
    return _as_written(found, reference) if found else None


def _trains(pair: Pair) -> bool:
    """Whether any of torch's norms is in train mode."""
    return any(part.training for part in norms(pair.torch))


def _is_slight(found: Divergence) -> bool:
    """Whether it may be rounding that a chain of layers has added up."""
    return found.error <= _SLIGHT * found.scale


def _as_written(found: Divergence, reference: Reference) -> Divergence:
    """The divergence by the names that torch's module has: one layer of a recurrent stack is not a
    module of its own there, and the sentence says which it is."""

    # What computes a layer's weight is a part of the layer.
    found = dataclasses.replace(found, layer=found.layer.partition(".parametrizations")[0])

    def name(layer: str) -> str:
        return whole(layer) if is_single(reference.modules.get(layer)) else layer

    if name(found.layer) == found.layer and (
        not found.between or found.between == tuple(name(n) for n in found.between)
    ):
        return found
    between = found.between
    if between is not None:
        between = name(between[0]), name(between[1])
        between = None if between[0] == between[1] else between  # all of it within the stack
    inside = found.layer if name(found.layer) != found.layer else ""
    said = f"{inside.rpartition('.')[2]} of {whole(inside)}: {found.diagnosis}" if inside else (
        found.diagnosis)  # fmt: skip
    return dataclasses.replace(found, layer=name(found.layer), between=between, diagnosis=said)


def _nearer(pair: Pair, found: Divergence | None, explain: Explainer) -> Divergence | None:
    """The divergence at the place that the values tell, where Flax shows none of the layers that
    torch calls there: a function of its parameters, a layer of somebody's own."""
    if found is None or explain.first is None or found.source or found.tensor:
        return found
    layer = found.layer
    inside = f"{layer}." if layer else ""
    modules = explain.reference.order
    shown = [n for n in modules if n and n.startswith(inside) and n in explain.paired]
    if shown or not any(n and n.startswith(inside) for n in modules):
        return found
    try:
        place = first_unseen(pair, layer)
    except Exception:  # the place by layers stands
        LOG.debug("no place by values", exc_info=True)
        return found
    if place is None:
        return found
    layer, between = place
    return dataclasses.replace(
        found, layer=layer, between=between, flax_layer=explain.flax_of(layer)
    )


def _in_float64(pair: Pair, pairing: Pairing, helping: Helps, seconds: float) -> Divergence | None:
    """What float32's rounding hides, if it can be named."""
    exact = Reference(pair.torch, pair.call, "float64")
    wide = flax_module(pair.flax, "float64")
    wide.unroll = True
    exact.step(pairing.of_torch())
    matched = Matched(pair.torch, wide, pairing.matches, helping)
    matched.wrong()
    explain = Explainer(exact, wide, pairing, matched, sure=True)
    found: Divergence | None = Forward(exact, wide, pairing, explain).run(pair.flax_call)
    if found is not None or explain.first is None:
        return found
    unknown = explain.first[1]
    found = _repaired(pair, unknown, explain, seconds)
    return None if found is unknown else found


def _moved_in_float64(pair: Pair, pairing: Pairing, helping: Helps) -> Divergence | None:
    """Running statistics that are others in float64, where every value before them is right: then
    what float32 shows is rounding (Flax's fast variance), and they are the difference."""
    exact = Reference(pair.torch, pair.call, "float64")
    wide = flax_module(pair.flax, "float64", training=True)
    wide.forced = _trains(pair)
    exact.step(pairing.of_torch())
    wrong: list[Event] = []
    walk = Forward(exact, wide, pairing, wrong.append)
    walk.run(pair.flax_call)
    if wrong:
        return None
    return running_statistics(exact, walk, Matched(pair.torch, wide, pairing.matches, helping))


def _repaired(
    pair: Pair, found: Divergence | None, explain: Explainer, seconds: float
) -> Divergence | None:
    """The divergence with a cause by search, where it has none, or one that was guessed from the
    code of known layers though this is the user's own."""
    if found is None or explain.first is None or seconds <= 0:
        return found
    nameless = found.cause in ("unknown", "shape")
    if not nameless and not explain.guessed and found.cause not in _PASSED_BY:
        return found
    event = explain.first[0]
    runs = Runs(pair, explain.reference, explain.side, explain.pairing, explain.case, found.layer)
    fitting = repair(runs, event, seconds) if nameless or explain.guessed else None
    if fitting is None or fitting.reason is None or fitting.omits:
        left = seconds - (fitting.spent if fitting is not None else 0.0)
        onward = repair_onward(runs, event, left) if left > 0 else None
        fitting = onward if onward and onward.reason else fitting
    if fitting is not None and (reason := fitting.reason) is not None:
        layer = fitting.module
        return dataclasses.replace(
            found, layer=layer, flax_layer=explain.flax_of(layer), cause=reason.cause,
            diagnosis=reason.diagnosis, advice=reason.advice, source=fitting.source,
            flax_source=fitting.flax_source,
        )  # fmt: skip
    if (
        nameless
        and fitting is not None
        and (fitting.said or fitting.module.startswith(f"{found.layer}."))
    ):
        layer = fitting.module
        found = dataclasses.replace(
            found,
            layer=layer,
            flax_layer=explain.flax_of(layer),
            source=fitting.source,
            flax_source=fitting.flax_source,
        )
    if not nameless:
        return found
    if (rounded := rounding(event)) is not None:
        return dataclasses.replace(
            found, cause=rounded.cause, diagnosis=rounded.diagnosis, advice=rounded.advice
        )
    found = dataclasses.replace(found, diagnosis=with_statistics(found.diagnosis, event))
    if fitting is None or not fitting.said:
        return found
    return dataclasses.replace(found, diagnosis=f"{found.diagnosis}; {fitting.said}")
