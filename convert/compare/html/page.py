"""What the page says of each level, and the sentence below the verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from convert.compare.html.text import listed, some
from convert.compare.report import Report, Training
from convert.judge.noise import MARGIN
from convert.judge.rows import Row

STATISTICS = 1000  # rows of a table that carry them; in a longer one, the farthest from their noise
LOWEST = 0.01  # the bar's left end, as a multiple of the noise


@dataclass(frozen=True)
class Section:
    """The rows of one level; of training, of one optimizer."""

    title: str  # "outputs", "training, SGD"
    noun: str  # what one row is
    path: str  # where the report's JSON has the rows: "outputs", "training.0.rows"
    caption: str
    rows: Sequence[Row]
    run: Training | None = None

    @cached_property
    def judged(self) -> list[Row]:
        return [r for r in self.rows if r.judged]

    @cached_property
    def bad(self) -> list[Row]:
        """Those beyond their noise."""
        return [r for r in self.judged if not r.same]

    @cached_property
    def worst(self) -> float:
        return max((r.ratio for r in self.judged), default=0.0)

    @cached_property
    def detailed(self) -> set[int]:
        """The numbers of the rows whose statistics the table shows."""
        rows = self.rows
        order = sorted(range(len(rows)), key=lambda i: (rows[i].same, -rows[i].ratio))
        return set(order[:STATISTICS])

    @cached_property
    def highest(self) -> float:
        """The bar's right end: the decade above the farthest row, between 100 and 1e9."""
        finite = [r.ratio for r in self.rows if math.isfinite(r.ratio)]
        return 10.0 ** min(9, max(2, math.ceil(math.log10(max([*finite, 1.0])))))

    def along(self, ratio: float) -> float:
        """Where on the bar a ratio lies, from 0 to 1."""
        if not ratio > LOWEST:
            return 1.0 if math.isnan(ratio) else 0.0
        return round(min(1.0, math.log10(ratio / LOWEST) / math.log10(self.highest / LOWEST)), 3)


def sections(report: Report) -> list[Section]:
    """Those that have rows, in order."""
    out, grads = report.outputs, report.gradients
    found = [
        Section("outputs", "output", "outputs", "Outputs and intermediates", out),
        Section("gradients", "gradient", "gradients", "Gradients", grads),
    ]
    for i, run in enumerate(report.training):
        title, path = f"training, {run.optimizer}", f"training.{i}.rows"
        caption = f"After training with {run.optimizer}"
        found.append(Section(title, "value", path, caption, run.rows, run))
    return [s for s in found if s.rows]


def reason(report: Report, shown: Sequence[Section]) -> str:
    """Why the verdict is what it is, as one sentence without its end."""
    parts = []
    differences = len(report.differences)
    if differences:
        total = f" of {report.compared:,}" if report.compared > differences else ""
        parts.append(f"{differences:,}{total} tensors differ in their bits")
    elif report.compared and report.verdict == "same":
        parts.append(f"all {some(report.compared, 'tensor')} are equal bit for bit")
    bad = [s for s in shown if s.bad]
    if bad:
        beyond = _levels(bad, lambda s: f"{len(s.bad):,} of {some(len(s.rows), s.noun)}")
        parts.append(f"beyond the rounding noise: {beyond}")
    elif report.verdict == "same" and any(s.judged for s in shown):
        within = _levels(shown, lambda s: some(len(s.rows), s.noun))
        parts.append(f"{within} stay within {MARGIN:g} times the rounding noise")
    sentence = "; ".join(parts) or "nothing was compared"
    return sentence[0].upper() + sentence[1:]


def _levels(shown: Sequence[Section], count: Callable[[Section], str]) -> str:
    """ "46 outputs, 30 gradients and training with SGD and Adam"."""
    runs = [s.run.optimizer for s in shown if s.run]
    told = [count(s) for s in shown if not s.run]
    return listed([*told, f"training with {listed(runs)}"] if runs else told)


def telling(report: Report) -> Row | None:
    """The row that stands for the verdict: the first that differs, or the farthest of the same."""
    judged = [r for r in report.rows if r.judged]
    return next((r for r in judged if not r.same), max(judged, key=lambda r: r.ratio, default=None))
