"""From the first value that is wrong to a problem of search, and from its answer to a reason."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from convert.diagnose.case import Case
from convert.diagnose.causes import Reason, found, repaired
from convert.diagnose.reference import Reference
from convert.diagnose.repair.edit import short
from convert.diagnose.repair.replayed import NEAR, Observation
from convert.diagnose.repair.search import Answer, Problem
from convert.diagnose.repair.worker import Worker
from convert.diagnose.walk import Event, Forward
from convert.matching.pair import Pair
from convert.matching.pairing import Pairing
from convert.program.operations import Operation, Program
from convert.program.record import Goal, NotSeen, Recording, record
from convert.runtime.flax_module import FlaxModule
from convert.runtime.torch_module import replica
from convert.runtime.torch_recurrent import restack, whole

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Repair:
    """What an edit of torch's computation explains."""

    reason: Reason
    module: str  # the innermost torch module around the operation
    source: str | None  # "nets.py:42"


@dataclass
class Runs:
    """Both sides of a walk, and what makes a case of an event in it."""

    pair: Pair
    reference: Reference
    side: FlaxModule
    pairing: Pairing
    case: Callable[[Reference, Event], Case]


def repair(runs: Runs, event: Event, seconds: float) -> Repair | None:
    """The smallest edit of torch's own computation that gives Flax's value; None where none does
    within the time."""
    worker = Worker()
    try:
        problem = _problem(runs, event, seconds)
        if problem is None:
            return None
        return _said(problem.program, worker.solve(problem), problem.samples[0])
    except Exception:  # the verdict and its place stand without it
        LOG.debug("repair failed", exc_info=True)
        return None
    finally:
        worker.close()


def _problem(runs: Runs, event: Event, seconds: float) -> Problem | None:
    target = Goal(event.call.key, "input" if event.where == "input" else "output", event.key)
    try:
        first = _recorded(runs, runs.reference, event, target)
    except NotSeen as e:
        LOG.debug("%s", e)
        return None
    samples = [_sample(first, runs.case(runs.reference, event))]
    try:
        second = _second(runs, event, target, first)
    except Exception:  # one sample is still a sample
        LOG.debug("no second sample", exc_info=True)
        second = None
    return Problem(first.program, samples + ([second] if second else []), seconds)


def _recorded(runs: Runs, reference: Reference, event: Event, target: Goal) -> Recording:
    module = replica(runs.pair.torch, "float64")
    if not any(whole(name) != name for name in (*event.past, target.call[0])):
        module = restack(module)  # no layer of a stack has a counterpart of its own
    return record(module, runs.pair.call, "float64", reference.calls, event.past, target)


def _sample(recording: Recording, case: Case) -> Observation:
    return Observation(recording.leaves, case.targets, case.right, case.tolerance)


def _second(runs: Runs, event: Event, target: Goal, first: Recording) -> Observation | None:
    """The same place in a run in which every layer before it gave other values."""
    done = {n for n in event.past if not any(o.startswith(f"{n}.") for o in event.past)}
    if event.where == "output":
        done -= {event.pair.torch}
    if not done:
        return None
    precision = runs.reference.precision
    reference = Reference(runs.pair.torch, runs.pair.call, precision, disturbed=done)
    reference.step(runs.pairing.of_torch())
    wanted = event.pair.torch, event.call.index, event.where, event.key

    def explain(other: Event) -> Event | None:
        key = other.pair.torch, other.call.index, other.where, other.key
        return other if key == wanted else None

    found = Forward(reference, runs.side, runs.pairing, explain).run(runs.pair.flax_call)
    if found is None:
        return None
    again = _recorded(runs, reference, event, target)
    if not _alike(first.program, again.program):
        return None
    return _sample(again, runs.case(reference, found))


def _alike(a: Program, b: Program) -> bool:
    return (
        a.leaves == b.leaves
        and a.target == b.target
        and [(o.function, o.made) for o in a.operations]
        == [(o.function, o.made) for o in b.operations]
    )


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
    return Repair(reason, operation.module, source)


def _place(program: Program, operation: Operation) -> tuple[str, str | None]:
    """The expression, and its file and line."""
    site = operation.site
    if site is None:
        leaf = program.leaves.get(next(iter(operation.refs), -1))
        return leaf.name if leaf else operation.name, None
    file = os.path.relpath(site.file)
    file = site.file if file.startswith("..") else file
    return short(site.text, 90), f"{file}:{site.line}"


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
