"""The smallest edit of a program that gives Flax's values: what is tried, and what counts.

An edit explains a fault if it gives Flax's values within the rounding of the edited program itself,
and does so again on a second sample of values, where there is one. Named replacements and round
numbers come before numbers that were solved for, single edits before pairs.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from convert.diagnose.repair.edit import Changes, Edit, Node, word
from convert.diagnose.repair.edits_axes import interleavings, rearranged
from convert.diagnose.repair.edits_numbers import numbers
from convert.diagnose.repair.edits_orders import functions, orders
from convert.diagnose.repair.edits_recurrent import recurrent
from convert.diagnose.repair.edits_siblings import leave_out, siblings, solved_after
from convert.diagnose.repair.edits_tables import sinusoids, tables
from convert.diagnose.repair.edits_values import insertions, leaf_edits, neutral, operands
from convert.judge.noise import MARGIN
from convert.judge.rows import FLOOR
from convert.matching.alignment import gap
from convert.program.operations import Program
from convert.program.replay import Values, changed, replay

NEAR = 50  # times the tolerance: a fault smaller than that may be explained by luck
_PAIRED = 1.35  # edits that cost more are not tried in pairs
_SPREAD = 0.25  # after a first fit, how much dearer edits are still looked at


@dataclass
class Observation:
    """One run of both sides: torch's values at the leaves, and what each made of them."""

    leaves: Values
    targets: list[np.ndarray]  # Flax's value, in each way in which its axes may lie
    right: np.ndarray  # torch's
    tolerance: float

    @property
    def error(self) -> float:
        """How far the two are apart."""
        return min(gap(t, self.right) for t in self.targets)


@dataclass
class Problem:
    """What is to be explained. The first sample is searched, the others confirm."""

    program: Program
    samples: list[Observation]
    seconds: float = 20.0
    skip: frozenset[int] = frozenset()  # candidates that ended the process before


@dataclass(frozen=True)
class Fit:
    """An edit that explains the fault."""

    cost: float
    cause: str
    said: str
    place: int  # index of the operation
    free: bool = False  # with a number that was solved for, and is not round
    error: float = 0.0  # what it leaves, over the tolerance


@dataclass
class Answer:
    """What was found: the best first."""

    fits: list[Fit] = field(default_factory=list)
    tried: int = 0
    reproduced: bool = True  # whether the record gives torch's own values again
    finished: bool = True  # whether all was tried in time


def search(problem: Problem, note: Callable[[int], None] = lambda number: None) -> Answer:
    """The edits that explain the fault; `note` gets the number of each before it is tried."""
    import torch

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _Search(problem, note).run()


class _Search:
    def __init__(self, problem: Problem, note: Callable[[int], None]) -> None:
        self.problem, self.note = problem, note
        self.program = problem.program
        self.end = time.monotonic() + problem.seconds
        self.answer = Answer()
        self.runs: list[tuple[Observation, Values]] = []
        self._written: list[list[int]] = []  # how often each value has been written into
        self._leaves: list[Values] = []  # as they came
        self._rough: Values | None = None

    def run(self) -> Answer:
        for sample in self.problem.samples:
            kept = {v: t.clone() for v, t in sample.leaves.items()}
            if (values := self._reproduced(sample)) is not None:
                self.runs.append((sample, values))
                self._written.append(_versions(values))
                self._leaves.append(kept)
            elif sample is self.problem.samples[0]:
                self.answer.reproduced = False
                return self.answer
        singles = sorted(every(self.program, self.runs[0][1]), key=lambda e: e.cost)
        helped = self._singles(singles)
        if not self.answer.fits and not self._late():
            self._pairs(singles, helped)
        self.answer.fits.sort(key=lambda f: (_leaves_much(f, self.answer.fits), f.cost))
        return self.answer

    def _reproduced(self, sample: Observation) -> Values | None:
        """The values of the replay, if it gives torch's own. A second sample must differ too."""
        try:
            values = replay(self.program, sample.leaves)
        except Exception:
            return None
        made = _numpy(values.get(self.program.target))
        if made is None or made.shape != sample.right.shape:
            return None
        scale = float(np.abs(made[np.isfinite(made)]).max(initial=0.0))
        if gap(made, sample.right) > max(sample.tolerance, 64 * FLOOR * scale):
            return None
        return values if sample.error > 3 * sample.tolerance else None

    def _singles(self, edits: Sequence[Edit]) -> dict[int, float]:
        """Tries each; the errors of those that change the value, by index."""
        helped: dict[int, float] = {}
        best: float | None = None
        for number, edit in enumerate(edits):
            if self._late() or (best is not None and edit.cost > best + _SPREAD):
                break
            if number in self.problem.skip:
                continue
            self._note(number)
            if edit.free is not None:
                fit = self._solved(edit)
            else:
                error = self._error(0, edit)
                helped[number] = error
                fit = self._fit(edit) if error <= self._tolerance(0, edit, error) else None
            if fit is not None:
                self.answer.fits.append(fit)
                best = fit.cost if best is None else min(best, fit.cost)
        return helped

    def _pairs(self, edits: Sequence[Edit], helped: Mapping[int, float]) -> None:
        """Two edits at once: neutral rewrites with any, then two cheap ones, those first that by
        themselves come nearer."""
        first = self.runs[0][0].error
        plain = [i for i, e in helped.items() if np.isfinite(e) and edits[i].cost <= _PAIRED]
        quiet = [e for node in _nodes(self.program, self.runs[0][1]) for e in neutral(node)]
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
        """Whether both at once explain it. The dearer one is named with the other."""
        if set(a.changes) & set(b.changes) or set(a.leaves) & set(b.leaves) or self._late():
            return False
        both = replace(
            b, changes={**a.changes, **b.changes}, leaves={**a.leaves, **b.leaves},
            cost=a.cost + b.cost + 2, said=f"{b.said}, and {a.said}", at=b.place,
        )  # fmt: skip
        self._note(-1)
        error = self._error(0, both)
        if error > self._tolerance(0, both, error) or (fit := self._fit(both)) is None:
            return False
        self.answer.fits.append(fit)
        return True

    def _note(self, number: int) -> None:
        self.answer.tried += 1
        self.note(number)

    def _late(self) -> bool:
        late = time.monotonic() > self.end
        self.answer.finished = self.answer.finished and not late
        return late

    # --- What an edit gives ---

    def _made(self, run: int, edit: Edit, changes: Changes | None = None) -> np.ndarray | None:
        sample, values = self.runs[run]
        made = None
        with contextlib.suppress(Exception):
            new = {v: f(values[v]) for v, f in edit.leaves.items()}
            made = _numpy(changed(self.program, values, changes or edit.changes, new))
        if (
            _versions(values) != self._written[run]
        ):  # an operation that writes into what it is given
            clean = {v: t.clone() for v, t in self._leaves[run].items()}
            self.runs[run] = sample, replay(self.program, clean)
            self._written[run] = _versions(self.runs[run][1])
            return None
        return made

    def _error(self, run: int, edit: Edit, changes: Changes | None = None) -> float:
        made = self._made(run, edit, changes)
        if made is None:
            return float("inf")
        targets = [t for t in self.runs[run][0].targets if t.shape == made.shape]
        return min((gap(made, t) for t in targets), default=float("inf"))

    def _tolerance(self, run: int, edit: Edit, error: float) -> float:
        """The rounding of the edited program, where the error is near that of torch's own."""
        tolerance = self.runs[run][0].tolerance
        if not tolerance < error <= NEAR * tolerance or error > 1e-4 * self.runs[0][0].error:
            return tolerance
        if self._rough is None:
            self._rough = _float32(self.program, self.runs[0][0].leaves)
        if run or not self._rough:
            return tolerance
        made = self._made(run, edit)
        with contextlib.suppress(Exception):
            new = {v: f(self._rough[v]) for v, f in edit.leaves.items()}
            rough = _numpy(changed(self.program, self._rough, edit.changes, new))
            assert made is not None
            assert rough is not None
            scale = float(np.abs(made[np.isfinite(made)]).max(initial=0.0))
            return max(tolerance, MARGIN * max(gap(made, rough), FLOOR * scale))
        return tolerance

    def _fit(self, edit: Edit) -> Fit | None:
        """The edit as an explanation, if the second sample agrees."""
        for run in range(1, len(self.runs)):
            error = self._error(run, edit)
            if error > max(self.runs[run][0].tolerance, 1e-3 * self.runs[run][0].error):
                return None
        left = self._error(0, edit) / self.runs[0][0].tolerance
        return Fit(edit.cost, edit.cause, edit.said, edit.place, edit.free is not None, left)

    def _solved(self, edit: Edit) -> Fit | None:
        """The number for which the edit fits, found by Gauss-Newton; said as a round one if it
        is one."""
        assert edit.free is not None
        target = self.runs[0][0].targets[0]
        c = edit.start
        made = self._made(0, edit, edit.free(c))
        for _ in range(12):
            if made is None or made.shape != target.shape:
                return None
            moved = self._step(edit, c, made, target)
            if moved is None:
                return None
            error = gap(made, target)
            for part in (1.0, 0.5, 0.2, 0.05):
                closer = self._made(0, edit, edit.free(c + part * moved))
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
        beside = self._made(0, edit, edit.free(c + step))
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
            error = self._error(0, exact)
            if error <= self._tolerance(0, exact, error):
                return self._fit(exact)
        sample = self.runs[0][0]
        if sample.error < NEAR * sample.tolerance or len(self.runs) < 2:
            return None  # a number that is not round needs a second sample
        solved = replace(edit, changes=edit.free(c), said=edit.said.format(number=word(c)))
        error = self._error(0, solved)
        return self._fit(solved) if error <= self._tolerance(0, solved, error) else None


def _leaves_much(fit: Fit, others: Sequence[Fit]) -> bool:
    """Whether another explanation leaves far less of the difference."""
    return fit.error > 0.05 and any(o.error < fit.error / 20 for o in others)


def _rounded(c: float) -> Iterator[float]:
    """Numbers that people write, near c."""
    for digits in (1, 2, 3):
        number = float(f"{c:.{digits - 1}e}")
        if c and abs(number - c) < 1e-2 * abs(c):
            yield number
    for n in range(2, 129):
        for number in (n**0.5, n**-0.5, 1 / n):
            if c and abs(number - abs(c)) < 1e-4 * number:
                yield number if c > 0 else -number
    if abs(c) < 1e-7:
        yield 0.0


def every(program: Program, values: Values) -> Iterator[Edit]:
    """All single edits, of one operation and of groups."""
    nodes = list(_nodes(program, values))
    sites: dict[Any, list[int]] = defaultdict(list)
    names: dict[str, list[int]] = defaultdict(list)
    for node in nodes:
        site = node.operation.site
        sites[(site.position if site else None, node.name)].append(node.index)
        names[node.name].append(node.index)
    for node in nodes:
        site = node.operation.site
        same = sites[(site.position if site else None, node.name)]
        for edit in _of(node):
            edit.cause = _of_masks(node, edit.cause)
            yield edit
            yield from _grouped(edit, node, same, names[node.name])
    makers = (leaf_edits, tables, sinusoids, functions, orders, interleavings)
    for maker in makers:
        with contextlib.suppress(Exception):  # as below
            yield from maker(program, values)


def _all_alike(
    free: Callable[[float], Changes], index: int, indices: list[int]
) -> Callable[[float], Changes]:
    """The same number in several operations."""
    return lambda c: dict.fromkeys(indices, free(c)[index])


def _of_masks(node: Node, cause: str) -> str:
    """What is done to truth values concerns a mask."""
    import torch

    if node.out is None or node.out.dtype != torch.bool:
        return cause
    plain = ("left_out", "operation", "operand", "constant", "offset", "order", "reversed", "size")
    return "mask" if cause in plain else cause


def _grouped(edit: Edit, node: Node, same: list[int], alike: list[int]) -> Iterator[Edit]:
    """The same edit in every run of one expression, and in all operations of one name."""
    for indices, extra in ((same, 0.05), (alike, 0.15)):
        if len(indices) < 2 or indices[0] != node.index or (indices is alike and alike == same):
            continue
        if edit.free is None:
            change = edit.changes[node.index]
            grouped = replace(edit, changes=dict.fromkeys(indices, change), cost=edit.cost + extra)
        else:
            free = _all_alike(edit.free, node.index, indices)
            grouped = replace(edit, cost=edit.cost + extra, at=indices[0], free=free)
        yield grouped


def _of(node: Node) -> Iterator[Edit]:
    makers: Iterable[Callable[[Node], Iterator[Edit]]] = (
        leave_out, siblings, numbers, rearranged, recurrent, operands, insertions, solved_after,
    )  # fmt: skip
    for maker in makers:
        with contextlib.suppress(
            Exception
        ):  # one that does not know this form takes no other along
            yield from maker(node)


def _nodes(program: Program, values: Values) -> Iterator[Node]:
    for index, operation in enumerate(program.operations):
        if operation.made[0] in values:
            yield Node(index, operation, program, values)


def _float32(program: Program, leaves: Values) -> Values:
    import torch

    def rough(x: Any) -> Any:
        if x.dtype == torch.float64:
            return x.float()
        return x.to(torch.complex64) if x.dtype == torch.complex128 else x

    with contextlib.suppress(Exception):
        return replay(program, {v: rough(x) for v, x in leaves.items()})
    return {}


def _versions(values: Values) -> list[int]:
    return [t._version for t in values.values()]


def _numpy(tensor: Any) -> np.ndarray | None:
    import torch

    if not isinstance(tensor, torch.Tensor):
        return None
    x = tensor.detach().resolve_conj().resolve_neg()
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()
    made = x.numpy()
    if made.dtype.kind == "c":
        return made.astype(np.complex128, copy=False)
    return made.astype(np.float64, copy=False)
