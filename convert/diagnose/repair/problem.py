"""From the first value that is wrong to a problem of search, and from its answer to a reason."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from convert.diagnose.case import Case
from convert.diagnose.causes import Reason, found, repaired
from convert.diagnose.reference import Reference
from convert.diagnose.repair.frontier import LONG, first_lacking, frontier
from convert.diagnose.repair.replayed import NEAR, Observation
from convert.diagnose.repair.search import Answer, Fit, Near, Problem
from convert.diagnose.repair.worker import Worker
from convert.diagnose.unseen import SeenValues, flax_part, seen_in
from convert.diagnose.walk import Event, Forward, Onward
from convert.matching.pair import Pair
from convert.matching.pairing import Pairing
from convert.program.operations import Operation, Program
from convert.program.record import Goal, NotSeen, Recording, record
from convert.program.replay import replay
from convert.runtime.call import Call
from convert.runtime.flax_module import flax_module
from convert.runtime.jax_values import Computed, computed_by
from convert.runtime.pure_module import FlaxModule
from convert.runtime.torch_calls import copied
from convert.runtime.torch_module import replica
from convert.runtime.torch_recurrent import restack, whole

LOG = logging.getLogger(__name__)
_TRIED = 6  # places farther on that are looked at
_SEVERAL = 4  # times the rounding of one step, for that of a few


@dataclass(frozen=True)
class Repair:
    """What an edit of torch's computation explains, or where that computation is."""

    reason: Reason | None  # None where nothing fits
    module: str  # the innermost torch module around the operation
    source: str | None  # "nets.py:42"
    omits: bool = False  # whether Flax has an operation less here
    said: str = ""  # where nothing fits: where the two part first
    flax_source: str | None = None  # "net_flax.py:77", where Flax computes something else
    spent: float = 0.0  # seconds of computing


@dataclass
class Runs:
    """Both sides of a walk, and what makes a case of an event in it."""

    pair: Pair
    reference: Reference
    side: FlaxModule
    pairing: Pairing
    case: Callable[[Reference, Event], Case]
    layer: str = ""  # the module at fault, as far as is known: its operations are tried first

    @functools.cached_property
    def computed(self) -> list[Computed]:
        """All that Flax computes, in float64."""
        return computed_by(flax_module(self.pair.flax, "float64"), self.pair.flax_call)

    @functools.cached_property
    def seen(self) -> SeenValues:
        """The same, to be found again."""
        return seen_in(self.computed)


def repair(runs: Runs, event: Event, seconds: float) -> Repair | None:
    """The smallest edit of torch's own computation that gives Flax's value; None where none does
    within the time."""
    return _solved(runs, lambda: _problem(runs, event, seconds))


def repair_onward(runs: Runs, event: Event, seconds: float) -> Repair | None:
    """As `repair`, of a value farther on, that layers after the event have a part in: what is done
    before a layer in torch and after it in Flax shows there."""
    return _solved(runs, lambda: _farther(runs, event, seconds))


def _solved(runs: Runs, make: Callable[[], Problem | None]) -> Repair | None:
    worker = Worker()
    try:
        if (problem := make()) is None:
            return None
        answer = worker.solve(problem)
        found = _said(problem.program, answer, problem.samples[0])
        found = found and _known(runs, problem, answer.fits[0], found)
        found = _placed(runs, problem, found or Repair(None, _around(problem.program), None))
        return replace(found, spent=answer.spent if answer.finished else problem.seconds)
    except Exception:  # the verdict and its place stand without it
        LOG.debug("repair failed", exc_info=True)
        return None
    finally:
        worker.close()


def _problem(runs: Runs, event: Event, seconds: float) -> Problem | None:
    try:
        first = _recorded(runs, runs.reference, event.past, event)
    except NotSeen as e:
        LOG.debug("%s", e)
        return None

    def same(runs: Runs, reference: Reference) -> Event | None:
        walk = Forward(reference, runs.side, runs.pairing, lambda e: e, chosen=event.place)
        return walk.run(runs.pair.flax_call)  # type: ignore[no-any-return]

    return _in_two_samples(runs, event, event, first, same, seconds)


def _farther(runs: Runs, event: Event, seconds: float) -> Problem | None:
    goal, first = _goal(runs, event)
    if goal is None or first is None:
        return None

    def same(runs: Runs, reference: Reference) -> Event | None:
        return next((e for e in _later(runs, reference, event) if e.place == goal.place), None)

    return _in_two_samples(runs, event, goal, first, same, seconds)


def _later(runs: Runs, reference: Reference, event: Event) -> list[Event]:
    walk = Onward(reference, runs.side, runs.pairing, event)
    walk.run(runs.pair.flax_call)
    # What goes into a module with layers inside may be cut otherwise: those layers' own tell.
    return [e for e in walk.later if e.where != "input" or e.pair.flax not in walk.holding]


def _goal(runs: Runs, event: Event) -> tuple[Event | None, Recording | None]:
    """The next wrong input that the layer of the event has a part in, and its recording."""
    layer = event.pair.torch
    around = f"{event.visit.around.torch}." if event.visit.around else ""
    later = [e for e in _later(runs, runs.reference, event)
             if e.pair.torch != layer and not e.judged.same
             and (e.where == "input" or layer.startswith(f"{e.pair.torch}.")
                  or around == f"{e.pair.torch}.")]  # fmt: skip
    for goal in later[:_TRIED]:
        with contextlib.suppress(NotSeen):
            made = _recorded(runs, runs.reference, event.past, goal)
            parts = {o.module for o in made.program.operations}
            if any(m == layer or m.startswith(f"{layer}.") for m in parts):
                return goal, made
    return None, None


def _in_two_samples(
    runs: Runs, event: Event, goal: Event, first: Recording,
    same: Callable[[Runs, Reference], Event | None], seconds: float,
) -> Problem:  # fmt: skip
    """The problem, with the goal in a run in which every layer before the event gave other values,
    or, where there is none, in one on other inputs; `same` finds it in that run."""
    samples = [_sample(first, runs.case(runs.reference, goal), goal is not event)]
    done = {n for n in event.past if not any(o.startswith(f"{n}.") for o in event.past)}
    if event.where == "output":
        done -= {event.pair.torch}
    try:
        pair = runs.pair
        if not done:
            calls = _beside(pair.call), _beside(pair.flax_call)
            pair = replace(pair, call=calls[0], flax_call=calls[1])
        precision = runs.reference.precision
        reference = Reference(pair.torch, pair.call, precision, disturbed=done)
        reference.step(runs.pairing.of_torch())
        other = replace(runs, pair=pair, reference=reference)
        found = same(other, reference)
        again = _recorded(other, reference, event.past, goal)
        if found is not None and _alike(first.program, again.program):
            case = runs.case(reference, found)
            samples.append(_sample(again, case, goal is not event))
    except Exception:  # one sample is still a sample
        LOG.debug("no second sample", exc_info=True)
    return Problem(first.program, samples, seconds, near=_near(runs, first))


def _beside(call: Call) -> Call:
    """The call with other numbers of the same signs, zeros and whole numbers as they are; alike for
    both sides, however their axes lie."""

    def moved(x: np.ndarray) -> np.ndarray:
        if x.dtype.kind != "f" or not x.size or (x == np.rint(x)).all():
            return x
        scale = float(np.abs(x[np.isfinite(x)]).max(initial=0.0)) or 1.0
        return (x * (1 + 0.4 * np.sin(9 * x.astype(np.float64) / scale))).astype(x.dtype)

    return Call(*call.replaced({k: moved(np.asarray(x)) for k, x in call.arrays().items()}))


def _near(runs: Runs, recording: Recording) -> Near | None:
    """The operations to begin with, in a program so long that not all can be tried."""
    program = recording.program
    if len(program.operations) < LONG:
        return None
    with contextlib.suppress(Exception):  # all are tried in their order then
        values = replay(program, copied(recording.leaves))
        return frontier(program, values, runs.seen, runs.layer)
    return None


def _recorded(runs: Runs, reference: Reference, past: list[str], goal: Event) -> Recording:
    target = Goal(goal.call.key, "input" if goal.where == "input" else "output", goal.key)
    module = replica(runs.pair.torch, "float64")
    if not any(whole(name) != name for name in (*past, target.call[0])):
        module = restack(module)  # no layer of a stack has a counterpart of its own
    return record(module, runs.pair.call, "float64", reference.calls, past, target)


def _sample(recording: Recording, case: Case, several: bool) -> Observation:
    """`several`: whether more than one layer has rounded."""
    tolerance = case.tolerance * (_SEVERAL if several else 1)
    return Observation(recording.leaves, case.targets, case.right, tolerance)


def _alike(a: Program, b: Program) -> bool:
    return (
        a.leaves == b.leaves
        and a.target == b.target
        and [(o.function, o.made) for o in a.operations]
        == [(o.function, o.made) for o in b.operations]
    )


def _known(runs: Runs, problem: Problem, fit: Fit, made: Repair) -> Repair:
    """What is left out is not left out if Flax computes it all the same: then something else takes
    another value. A parameter without effect is not left out if Flax holds it as it was made."""
    reason = made.reason
    if reason is None or reason.cause not in ("left_out", "residual"):
        return made
    program = problem.program
    if fit.omits:
        values = replay(program, copied(problem.samples[0].leaves))
        x = values[program.operations[fit.place].made[0]]
        if runs.seen.has(x):
            return replace(made, reason=replace(reason, cause="operand"))
        return made
    for leaf in program.leaves.values():
        for word, number in (("ones", 1), ("zeros", 0)):
            if leaf.kind == "parameter" and fit.said == f"no {leaf.name}: {word}":
                held = [v for v in runs.side.values.values() if v.size > 1 and (v == number).all()]
                again = found("default", name=leaf.name, value=word)
                return replace(made, reason=again) if held else made
    return made


def _placed(runs: Runs, problem: Problem, made: Repair) -> Repair:
    """With the line of Flax's code that computes something else of what both have; and, where
    nothing explains it, the first of torch's values that Flax has not."""
    program = problem.program
    try:
        values = replay(program, copied(problem.samples[0].leaves))
        first = first_lacking(program, values, runs.seen)
        if first is None:
            return made
        taken = [x for x in (values[v] for v in first.refs) if x.is_floating_point()]
        part = flax_part(runs.pair, runs.computed, taken, values[first.made[0]].numel())
    except Exception:  # the layer is known
        LOG.debug("no place by values", exc_info=True)
        return made
    made = replace(made, flax_source=part.place if part is not None else None)
    if made.reason is not None or first.site is None:
        return made
    expression, source = _place(program, first)
    beside = f"`{part.text}` ({part.place})" if part is not None else ""
    if not taken and first.made[0] in program.tables:
        told = f": of the code alone it makes {beside}" if beside else ""
        where = f" ({source})" if source else ""
        reason = found("constant", "table", expression=expression, place=where, beside=told)
        return replace(made, module=first.module, source=source, reason=reason)
    said = f"torch computes `{expression}` ({source}), and Flax nowhere has those values"
    said += f": of the same it makes {beside}" if beside else ""
    return replace(made, module=first.module, source=source, said=said)


# --- In words ---


def _said(program: Program, answer: Answer, sample: Observation) -> Repair | None:
    """The best of the edits that fit. Near the tolerance many may: none is named then unless all
    say the same."""
    LOG.debug("%d candidates, fits: %s", answer.tried, answer.fits)
    if not answer.fits:
        return None
    best = answer.fits[0]
    if sample.error < NEAR * sample.tolerance and len({f.cause for f in answer.fits}) > 1:
        return None
    operation = program.operations[best.place]
    expression, source = _place(program, operation)
    reason = repaired(best.cause, expression=expression, place=source, said=best.said)
    return Repair(reason, operation.module, source, best.omits)


def _around(program: Program) -> str:
    """The module whose code makes the value."""
    maker = program.makers.get(program.target)
    return "" if maker is None else program.operations[maker].module


def _place(program: Program, operation: Operation) -> tuple[str, str | None]:
    """The expression, and its file and line."""
    site = operation.site
    if site is None:
        leaf = program.leaves.get(next(iter(operation.refs), -1))
        return leaf.name if leaf else operation.name, None
    return site.shown, site.place


_ROUNDED = {"bfloat16": (2.0**-14, 2.0**-7), "float16": (2.0**-18, 2.0**-14)}


def rounding(event: Event) -> Reason | None:
    """Differences that look like rounding to 16 bits: of that size, in most elements, and neither
    biased nor following the values."""
    a, b = event.exact, event.given
    if a.shape != b.shape or a.size < 16 or a.dtype.kind != "f":
        return None
    apart, scale = (b - a).ravel(), float(np.abs(a).max())
    if not np.isfinite(apart).all() or not scale or not apart.any():
        return None
    chance = 4 / np.sqrt(apart.size)
    many = (np.abs(apart) > event.judged.tolerance).mean() > 0.6
    biased = abs(apart.mean()) > max(0.25, chance) * apart.std()
    varied = float(a.std()) > 0
    follows = varied and abs(np.corrcoef(apart, a.ravel())[0, 1]) > max(0.2, chance)
    if not many or biased or follows or np.abs(apart).max() > 2.0**-5 * scale:
        return None
    size = float(np.median(np.abs(apart))) / scale
    for dtype, (least, most) in _ROUNDED.items():
        if least <= size < most:
            return found("dtype", "rounding", dtype=dtype)
    return None


def with_statistics(diagnosis: str, event: Event) -> str:
    """The sentence, with how the two values differ, where nothing explains it."""
    a, b = event.exact, event.given
    if a.shape != b.shape or not a.size:
        return diagnosis
    apart = np.abs(a.astype(np.complex128) - b)
    scale = float(np.abs(a[np.isfinite(a)]).max(initial=0.0)) or 1.0
    share = float((apart > event.judged.tolerance).mean())
    largest = float(np.nanmax(apart)) / scale
    text = f"{share:.0%} of the elements differ, by up to {largest:.2g} of the largest value"
    return f"{diagnosis} ({text})"
