"""The smallest edit of a program that gives Flax's values: what is tried, and what counts.

An edit explains a fault if it gives Flax's values within the rounding of the edited program itself,
and does so again on a second sample of values, where there is one. Named replacements and round
numbers come before numbers that were solved for, single edits before pairs.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from convert.diagnose.repair.candidates import every, nodes_of
from convert.diagnose.repair.edit import NAMELESS, Edit, word
from convert.diagnose.repair.edits_omitted import TIMES
from convert.diagnose.repair.edits_values import neutral
from convert.diagnose.repair.replayed import NEAR, Observation, Replayed
from convert.diagnose.repair.words import of_both, of_zeros
from convert.diagnose.unseen import SeenValues
from convert.matching.alignment import gap
from convert.program.operations import Program

_PAIRED = 1.35  # edits that cost more are not tried in pairs
_NEUTRAL = 0.5  # edits that cost less change nothing by themselves
BUSY = 10  # times the budget by the clock, where other processes take the processor
_NOTHING = 1e-5  # a factor as small as that is solved for as 0
_SPREAD = 0.25  # after a first fit, how much dearer edits are still looked at


@dataclass
class Problem:
    """What is to be explained. The first sample is searched, the others confirm."""

    program: Program
    samples: list[Observation]
    seconds: float = 20.0  # of computing; by the clock it may take BUSY times as long
    skip: frozenset[int] = frozenset()  # candidates that ended the process before
    near: Near | None = None  # where to begin, in a long program


@dataclass
class Near:
    """Operations that are tried first; and the last one of a stretch around them. An edit within it
    must give a value there that Flax has computed too, which is sooner seen than its result."""

    operations: frozenset[int]
    last: int
    seen: SeenValues


@dataclass(frozen=True)
class Fit:
    """An edit that explains the fault."""

    cost: float
    cause: str
    said: str
    place: int  # index of the operation
    free: bool = False  # with a number that was solved for, and is not round
    error: float = 0.0  # what it leaves, over the tolerance
    omits: bool = False  # whether an operation is left out


@dataclass
class Answer:
    """What was found: the best first."""

    fits: list[Fit] = field(default_factory=list)
    tried: int = 0
    reproduced: bool = True  # whether the record gives torch's own values again
    finished: bool = True  # whether all was tried in time
    spent: float = 0.0  # seconds of computing


def search(problem: Problem, note: Callable[[int], None] = lambda number: None) -> Answer:
    """The edits that explain the fault; `note` gets the number of each before it is tried."""
    import torch

    start = time.process_time()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer = _Search(problem, note).run()
    answer.spent = time.process_time() - start
    return answer


class _Search:
    def __init__(self, problem: Problem, note: Callable[[int], None]) -> None:
        self.problem, self.note = problem, note
        self.end = time.process_time() + problem.seconds
        self.latest = time.monotonic() + BUSY * problem.seconds
        self.answer = Answer()
        self.trials: list[Replayed] = []

    def run(self) -> Answer:
        for sample in self.problem.samples:
            if sample.error > 3 * sample.tolerance:  # else there is nothing to explain
                with contextlib.suppress(Exception):
                    self.trials.append(Replayed(self.problem.program, sample))
            if not self.trials:
                self.answer.reproduced = False
                return self.answer
        self.first, *self.others = self.trials
        edits: list[Edit] = []
        helped: dict[int, float] = {}
        near = self.problem.near
        if near is not None:
            found = every(self.problem.program, self.first.values, near.operations)
            edits += sorted(found, key=lambda e: e.cost)
            helped |= self._singles(edits, 0, near)
        if not self.answer.fits and not self._late():
            start = len(edits)
            edits += sorted(every(self.problem.program, self.first.values), key=lambda e: e.cost)
            helped |= self._singles(edits, start)
        if not self.answer.fits and not self._late():
            self._pairs(edits, helped)
        fits = self.answer.fits
        fits.sort(key=lambda f: (_leaves_much(f, fits), f.cause == NAMELESS, f.cost, -f.place))
        return self.answer

    def _singles(
        self, edits: Sequence[Edit], start: int, near: Near | None = None
    ) -> dict[int, float]:
        """Tries each; the errors of those that change the value, by index."""
        helped: dict[int, float] = {}
        best: float | None = None
        until = self.problem.program.until(near.last) if near is not None else None
        for number, edit in enumerate(edits[start:], start):
            if self._late() or (best is not None and edit.cost > best + _SPREAD):
                break
            if number in self.problem.skip:
                continue
            self._note(number)
            fit: Fit | None
            if edit.free is not None:
                fit = self._solved(edit)
            elif near and until and not self.first.gives(edit, until, near.seen.has):
                fit = None
            else:
                helped[number] = self.first.error(edit)
                fit = self._fit(edit, helped[number])
            if fit is not None:
                self.answer.fits.append(fit)
                best = fit.cost if best is None else min(best, fit.cost)
        return helped

    def _pairs(self, edits: Sequence[Edit], helped: Mapping[int, float]) -> None:
        """Two edits at once: neutral rewrites with any, then two cheap ones, those first that by
        themselves come nearer."""
        first = self.first.sample.error
        plain = [i for i, e in helped.items() if np.isfinite(e) and edits[i].cost <= _PAIRED]
        nodes = nodes_of(self.problem.program, self.first.values)
        quiet = [e for node in nodes for e in neutral(node)]
        for other in quiet:
            for i in plain:
                if self._pair(other, edits[i]):
                    return
        nearer = sorted(plain, key=lambda i: helped[i])
        nearer = [i for i in nearer if helped[i] < first] + [
            i for i in nearer if helped[i] >= first
        ]
        for total in range(1, 2 * len(nearer)):
            for a in range(max(0, total - len(nearer) + 1), (total + 1) // 2):
                if self._late() or self._pair(edits[nearer[a]], edits[nearer[total - a]]):
                    return

    def _pair(self, a: Edit, b: Edit) -> bool:
        """Whether both at once explain it. Two of different meaning may fit by luck: what they
        change is told then, without a cause."""
        if set(a.changes) & set(b.changes) or set(a.leaves) & set(b.leaves) or self._late():
            return False
        cause = b.cause if a.cost < _NEUTRAL else of_both(a.cause, b.cause)
        both = replace(
            b, cause=cause, changes={**a.changes, **b.changes}, leaves={**a.leaves, **b.leaves},
            cost=a.cost + b.cost + 2, said=f"{b.said}, and {a.said}",
            at=a.place if cause == a.cause != b.cause else b.place,
        )  # fmt: skip
        self._note(-1)
        if (fit := self._fit(both, self.first.error(both))) is None:
            return False
        self.answer.fits.append(fit)
        return True

    def _note(self, number: int) -> None:
        self.answer.tried += 1
        self.note(number)

    def _late(self) -> bool:
        late = time.process_time() > self.end or time.monotonic() > self.latest
        self.answer.finished = self.answer.finished and not late
        return late

    def _fit(self, edit: Edit, error: float) -> Fit | None:
        """The edit as an explanation, if it leaves no more than rounding, in every sample."""
        if error > self.first.tolerance(edit, error):
            return None
        for trial in self.others:
            sample = trial.sample
            if trial.error(edit) > max(sample.tolerance, 1e-3 * sample.error):
                return None
        left = error / self.first.sample.tolerance
        free = edit.free is not None
        return Fit(edit.cost, edit.cause, edit.said, edit.place, free, left, edit.omits)

    def _solved(self, edit: Edit) -> Fit | None:
        """The number for which the edit fits, found by Gauss-Newton; said as a round one if it
        is one."""
        assert edit.free is not None
        target = self.first.sample.targets[0]
        c = edit.start
        made = self.first.made(edit, edit.free(c))
        for _ in range(12):
            if made is None or made.shape != target.shape:
                return None
            moved = self._step(edit, c, made, target)
            if moved is None:
                return None
            error = gap(made, target)
            for part in (1.0, 0.5, 0.2, 0.05):
                closer = self.first.made(edit, edit.free(c + part * moved))
                if closer is not None and gap(closer, target) < error:
                    break
            else:
                break
            c, made = c + part * moved, closer
            if abs(part * moved) <= 1e-9 * max(abs(c), 1e-12):
                break
        return self._round(edit, c)

    def _step(self, edit: Edit, c: float, made: np.ndarray, target: np.ndarray) -> float | None:
        """How far Gauss-Newton moves the number."""
        assert edit.free is not None
        step = 1e-5 * max(abs(c), 1e-3)
        beside = self.first.made(edit, edit.free(c + step))
        if beside is None or beside.shape != made.shape:
            return None
        slope = (beside - made) / step
        held = np.isfinite(slope) & np.isfinite(target) & np.isfinite(made)
        size = float((np.abs(slope[held]) ** 2).sum())
        if size == 0 or not np.isfinite(size):
            return None
        moved = float(np.real(np.conj(slope[held]) * (target - made)[held]).sum()) / size
        return moved if np.isfinite(moved) and abs(c + moved) < 1e12 else None

    def _round(self, edit: Edit, c: float) -> Fit | None:
        assert edit.free is not None
        for number in _rounded(c):
            exact = replace(
                edit, changes=edit.free(number), free=None, at=edit.place,
                said=edit.said.format(number=word(number)), cost=edit.cost - 1.2,
            )  # fmt: skip
            if not number and edit.said == TIMES:
                why = of_zeros(self.problem.program, edit.place)
                exact = replace(exact, cause=why, said="zeros in its place")
            error = self.first.error(exact)
            if error <= self.first.tolerance(exact, error):
                return self._fit(exact, error)
        sample = self.first.sample
        if sample.error < NEAR * sample.tolerance or not self.others:
            return None  # a number that is not round needs a second sample
        solved = replace(edit, changes=edit.free(c), said=edit.said.format(number=word(c)))
        return self._fit(solved, self.first.error(solved))


def _leaves_much(fit: Fit, others: Sequence[Fit]) -> bool:
    """Whether another explanation leaves far less of the difference."""
    return fit.error > 0.05 and any(o.error < fit.error / 20 for o in others)


def _rounded(c: float) -> Iterator[float]:
    """Numbers that people write, near c."""
    if c and abs(c) < _NOTHING:
        yield 0.0
    for digits in (1, 2, 3):
        number = float(f"{c:.{digits - 1}e}")
        if c and abs(number - c) < 1e-2 * abs(c):
            yield number
    for n in range(2, 129):
        for number in (n**0.5, n**-0.5, 1 / n):
            if c and abs(number - abs(c)) < 1e-4 * number:
                yield number if c > 0 else -number
    for times in (1.0, 2.0, 3.0, 4.0, 0.5):
        if c and abs(times * np.pi - abs(c)) < 1e-4 * abs(c):
            yield float(np.sign(c) * times * np.pi)
    if abs(c) < 1e-7:
        yield 0.0
