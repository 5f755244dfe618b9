"""Where a gradient is stopped on one side only.

torch's own run, recorded operation by operation, tells what every gradient would be if it were
stopped at one of its values, or not stopped where torch detaches. What gives all of Flax's
gradients at once is the place.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from convert.compare.differentiated import Differentiated, Place, shown
from convert.compare.flax_side import FlaxSide
from convert.compare.report import Report
from convert.compare.torch_side import TorchSide
from convert.diagnose.causes import found
from convert.judge.noise import EXACT, MARGIN, Arrays, gap, largest
from convert.judge.rows import FLOOR, Row
from convert.program.operations import Operation, Ref, find, mapped
from convert.program.replay import resolve
from convert.runtime.precision import precision_of

_LEFT = 1e-4  # of a difference: the most that an explanation may leave


def stopped(report: Report, reference: TorchSide, flax: FlaxSide, seconds: float) -> Place | None:
    """The place that explains every gradient that differs; None where none does in this time.
    Raises what a run raises."""
    both = "float64" in flax.precisions and "float64" in reference.precisions
    precision = "float64" if both else "float32"
    rows = {r.name: r for r in report.gradients if r.judged}
    theirs = flax.run(precision, backward=True).gradients
    idle = sorted(n for n in flax.untrained() & rows.keys() if not rows[n].same)
    if idle and all(row.same for n, row in rows.items() if n not in idle):
        return Place(found("stop_gradient", "untrained", name=idle[0]), _owner(idle[0]), None)
    if (row := _padding_row(report, reference, theirs)) is not None:
        return row
    with precision_of(precision):
        search = _Search(reference, precision, {n: theirs[n] for n in rows if n in theirs}, rows)
        return search.run(time.monotonic() + seconds)


def _padding_row(report: Report, reference: TorchSide, theirs: Arrays) -> Place | None:
    """Where nothing differs but one row of a table, which torch gives no gradient."""
    wrong = [r.name for r in report.gradients if r.judged and not r.same]
    modules = dict(reference.module.named_modules())
    rows: list[tuple[str, int]] = []
    for name in wrong:
        row = getattr(modules.get(_owner(name)), "padding_idx", None)
        if row is None or name not in theirs or theirs[name].ndim != 2:
            return None
        rows.append((name, row))
    if not rows:
        return None
    ours = reference.run("float32", backward=True).gradients
    for name, row in rows:
        rest = np.arange(len(ours[name])) != row
        scale = largest(ours[name])
        if gap(ours[name][rest], theirs[name][rest]) > 1e-3 * scale or not theirs[name][row].any():
            return None
    return Place(found("padding_idx", row=rows[0][1]), _owner(rows[0][0]), None)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


class _Search:
    def __init__(
        self, reference: TorchSide, precision: str, theirs: Arrays, rows: Mapping[str, Row]
    ) -> None:
        self.reference, self.precision, self.theirs = reference, precision, theirs
        self.first = Differentiated(reference, precision)
        self.operations = self.first.mode.operations
        self.uses = Counter(v for o in self.operations for v in dict.fromkeys(o.refs))
        ours = self.first.total
        noise = {n: MARGIN * max(rows[n].noise, FLOOR * rows[n].scale) for n in theirs}
        if precision == "float64":
            noise = {n: EXACT * largest(ours[n]) for n in theirs}
        apart = {n: gap(ours[n], x) for n, x in theirs.items()}
        self.least = {n: max(noise[n], _LEFT * d) for n, d in apart.items()}
        self.differ = any(d > noise[n] for n, d in apart.items())

    def run(self, end: float) -> Place | None:
        """The first place that explains it: what torch detaches, then what stands last."""
        for search in (self._let_through, self._once, self._everywhere):
            for place in search() if self.differ else ():
                if place is not None or time.monotonic() > end:
                    return place
        return None

    def _explains(self, made: Arrays) -> bool:
        return all(gap(made[n], self.theirs[n]) <= least for n, least in self.least.items())

    def _once(self) -> Iterator[Place | None]:
        """Stopped in one place: what comes back through a result or an operand is missing."""
        for index in range(len(self.operations) - 1, -1, -1):
            operation = self.operations[index]
            with contextlib.suppress(Exception):  # what cannot be differentiated once more
                for where, value, cotangent in self._flows(operation):
                    lost = self.first.of(self.first.mode.held[value], cotangent)
                    made = {n: g - lost[n] for n, g in self.first.total.items()}
                    yield self._place(operation, where) if self._explains(made) else None

    def _flows(self, operation: Operation) -> Iterator[tuple[int, int, Any]]:
        """(operand, or -1 for a result; value; what comes back through it)."""
        import torch

        held = self.first.mode.held
        made = [v for v in operation.made if held[v].requires_grad]
        if operation.writes is not None or not made:
            return
        cotangents = self.first.cotangents([held[v] for v in made])
        for value, cotangent in zip(made, cotangents, strict=True):
            if cotangent is not None:
                yield -1, value, cotangent
        several = [v for v in operation.refs if held[v].requires_grad and self._several(v)]
        alone = {v: held[v].detach().requires_grad_(v in several) for v in operation.refs}
        if not several or any(c is None for c in cotangents):
            return

        def value_of(x: Any) -> Any:
            return alone[x.value] if isinstance(x, Ref) else x

        args, kwargs = (mapped(part, value_of) for part in (operation.args, operation.kwargs))
        output = resolve(operation.function)(*args, **kwargs)
        again = [t for t in find(output, torch.Tensor) if t.requires_grad]
        through = torch.autograd.grad(
            again, [alone[v] for v in several], cotangents, allow_unused=True
        )
        for value, cotangent in zip(several, through, strict=True):
            if cotangent is not None:
                yield operation.refs.index(value), value, cotangent

    def _several(self, value: int) -> bool:
        """Whether others take the value too, or it is differentiated itself."""
        return self.uses[value] > 1 or value in self.first.mode.leaves

    def _everywhere(self) -> Iterator[Place | None]:
        """Stopped in every run of an expression: in all layers of a stack."""
        sites: dict[Any, list[Operation]] = defaultdict(list)
        for operation in self.operations:
            if operation.site is not None and operation.writes is None:
                sites[operation.site.position, operation.name].append(operation)
        for key, runs in reversed(sites.items()):
            for where in range(-1, len(runs[0].refs) if len(runs) > 1 else -1):
                with contextlib.suppress(Exception):
                    made = Differentiated(self.reference, self.precision, stop=(key, where)).total
                    yield self._place(runs[0], where) if self._explains(made) else None

    def _let_through(self) -> Iterator[Place | None]:
        """What torch detaches, or computes without gradients, each by itself and all at once."""
        count = len(self.first.freed)
        for chosen in (*range(count), *([None] if count > 1 else [])):
            with contextlib.suppress(Exception):
                trial = Differentiated(self.reference, self.precision, through=(chosen,))
                yield self._detached(chosen) if self._explains(trial.total) else None

    def _detached(self, chosen: int | None) -> Place:
        """The value that torch detaches; all of several are told by the first."""
        detached = [o for o in self.operations if o.name == "detach"]
        before = self.first.freed[: chosen or 0].count("detach")
        if "detach" not in self.first.freed[chosen or 0 :][:1] or before >= len(detached):
            return Place(found("stop_gradient", "no_grad"), "", None)
        text, source = shown(detached[before])
        reason = found("stop_gradient", "detached", expression=text, place=source)
        return Place(reason, detached[before].module, source)

    def _place(self, operation: Operation, where: int) -> Place:
        text, source = shown(operation)
        leaf = self.first.mode.leaves.get(operation.refs[where]) if where >= 0 else None
        if leaf is not None:
            reason = found("stop_gradient", "use", name=leaf.name, expression=text, place=source)
        elif where >= 0:
            which = str(where + 1)
            reason = found("stop_gradient", "operand", which=which, expression=text, place=source)
        else:
            reason = found("stop_gradient", "value", expression=text, place=source)
        return Place(reason, operation.module, source)
