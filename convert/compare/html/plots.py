"""The page's plots."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from convert.compare.html.figure import Axis, Figure, Mark, decade
from convert.compare.html.text import number, some, times
from convert.compare.report import Training
from convert.judge.noise import MARGIN
from convert.judge.rows import FLOOR, Row

POINTS = 500  # a plot shows no more: of every so many neighbours the farthest from its noise
_MEANING = {"same": "within the noise", "differs": "differs", "unjudged": "not judged"}


def kind(row: Row) -> str:
    """ "same", "differs" or "unjudged"."""
    return "unjudged" if not row.judged else "same" if row.same else "differs"


def depth(rows: Sequence[Row], what: str) -> Figure:
    """Error of each row beside its noise, both as fractions of its largest value."""
    kept = list(_thinned(rows))
    end = len(kept)
    floors = [max(r.noise / r.scale, FLOOR) if r.scale else FLOOR for r in kept]
    errors = [r.error / r.scale if r.scale else r.error and math.inf for r in kept]
    xs = [i + 0.5 for i in range(end)]
    noise = [(0.0, floors[0]), *zip(xs, floors, strict=True), (float(end), floors[-1])]
    limit = [(x, MARGIN * y) for x, y in noise]
    marks = [
        Mark(kind(r), x, e, f"{r.name}: error {number(r.error)}, {times(r.ratio)} × noise")
        for x, e, r in zip(xs, errors, kept, strict=True)
    ]
    first = next((m.x for m in marks if m.kind == "differs"), None)
    thinned = f", the farthest of every {math.ceil(len(rows) / POINTS)}" * (end < len(rows))
    return Figure(
        f"Error by depth, {what}",
        f"Largest error as a fraction of the tensor’s largest value, in the order of execution"
        f"{thinned}. The shaded part is what rounding explains: {MARGIN:g} times the noise.",
        Axis(0, end, [(0, "first"), (end, f"last of {len(rows):,}")]),
        Axis.decades([*floors, *(MARGIN * f for f in floors), *errors]),
        [
            ("band", [(0, 0), *limit, (end, 0)]),
            ("limit", limit),
            ("noise", noise),
            ("trace", list(zip(xs, errors, strict=True))),
        ],
        marks,
        [
            *((k, v) for k, v in _MEANING.items() if any(m.kind == k for m in marks)),
            ("noise", "rounding noise"),
            ("limit", f"{MARGIN:g} × noise"),
        ],
        None if first is None else (first, kept[int(first)].name),
    )


def histogram(rows: Sequence[Row]) -> Figure | None:
    """Elements of all rows by the decade of their error, as a fraction of the scale."""
    all_bins = [r.statistics.bins for r in rows if r.statistics]
    count = max(map(len, all_bins), default=0)
    sums = [sum(b[i] for b in all_bins if i < len(b)) for i in range(count)]
    if not any(sums):
        return None
    # The first bin, of what is equal, then the decades that hold something.
    used = [i for i, n in enumerate(sums) if n and i]
    shown = [0, *(range(used[0], used[-1] + 1) if used else ())]
    labelled = list(enumerate(shown))[2 + len(shown) // 11 :: max(1, math.ceil(len(shown) / 7))]
    return Figure(
        "Histogram of errors",
        f"{some(sum(sums), 'element')} of all outputs and intermediates, by the decade of the "
        "error as a fraction of the tensor’s largest value.",
        Axis(0, len(shown), [(0.5, "equal"), *((i, decade(b - 20)) for i, b in labelled)]),
        Axis.decades([1, max(sums)]),
        marks=[
            # A single element is seen too.
            Mark("bar", i + 0.5, max(n, 1.25), f"{some(n, 'element')} {_bin(b, count)}")
            for i, b in enumerate(shown)
            if (n := sums[b])
        ],
    )


def losses(run: Training) -> Figure | None:
    """The loss of both sides over the steps."""
    axis = _steps(run)
    if axis is None:
        return None
    names = {"a float64": "exact", "a float32": "side-a", "b float32": "side-b"}
    shown = [(style, k) for k, style in names.items() if k in run.losses]
    return Figure(
        f"Loss: {_title(run)}",
        "Before the first step and after each.",
        axis,
        Axis.around(y for curve in run.losses.values() for y in curve),
        [(style, list(enumerate(run.losses[k]))) for style, k in shown],
        key=shown,
    )


def gap(run: Training) -> Figure | None:
    """|a - b| of the losses beside |float32 - float64| of the reference."""
    axis = _steps(run)
    if axis is None or not {"a float32", "b float32", "a float64"} <= run.losses.keys():
        return None
    a, b, exact = (run.losses[k] for k in ("a float32", "b float32", "a float64"))
    between = [abs(x - y) for x, y in zip(a, b, strict=False)]
    own = [abs(x - y) for x, y in zip(a, exact, strict=False)]
    # The curve is judged as a whole, as its row says.
    row = next((r for r in run.rows if r.name == "loss"), None)
    noise = max(own) if row is None else row.noise
    scale = max(map(abs, exact)) if row is None else row.scale
    limit = MARGIN * max(noise, FLOOR * scale)
    edge = [(0.0, limit), (axis.high, limit)]
    marks = [
        Mark("same" if y <= limit else "differs", i, y, number(y)) for i, y in enumerate(between)
    ]
    label = {"same": "between the two", "differs": "between the two, differs"}
    return Figure(
        f"Gap of the losses: {_title(run)}",
        f"The shaded part is {MARGIN:g} times PyTorch’s own largest gap, float32 to float64.",
        axis,
        Axis.decades([limit, *between, *own]),
        [
            ("band", [(0, 0), *edge, (axis.high, 0)]),
            ("limit", edge),
            ("noise", list(enumerate(own))),
            ("trace", list(enumerate(between))),
        ],
        marks,
        [
            *((k, v) for k, v in label.items() if any(m.kind == k for m in marks)),
            ("noise", "PyTorch’s own"),
        ],
    )


class Silhouette(NamedTuple):
    """The histogram of one tensor's errors: a path in a box `width` by 10, its ends in words."""

    width: int
    path: str
    low: str
    high: str


def silhouette(bins: Sequence[int]) -> Silhouette | None:
    """From the first bin that is not empty to the last, heights by the logarithm of the count."""
    used = [i for i, n in enumerate(bins) if n]
    if not used:
        return None
    low, high = used[0], used[-1]
    top = math.log10(max(bins) + 1)
    path = "".join(f"V{10 - 10 * math.log10(n + 1) / top:.1f}h1" for n in bins[low : high + 1])
    start = "equal" if low == 0 else number(10.0 ** (low - 20))
    return Silhouette(high + 1 - low, f"M0 10{path}V10z", start, number(10.0 ** (high - 19)))


def _thinned(rows: Sequence[Row]) -> Iterator[Row]:
    step = math.ceil(len(rows) / POINTS) or 1
    for i in range(0, len(rows), step):
        yield max(rows[i : i + step], key=lambda r: (not r.same, r.ratio))


def _bin(i: int, count: int) -> str:
    if i == 0:
        return "equal, or closer than 1e-19"
    if i == count - 1:
        return f"off by 1e{i - 20} or more, or not a number"
    return f"off by 1e{i - 20} to 1e{i - 19}"


def _steps(run: Training) -> Axis | None:
    steps = max((len(v) for v in run.losses.values()), default=0) - 1
    shown = range(0, steps + 1, math.ceil(steps / 10) or 1)
    return Axis(0, steps, [(i, str(i)) for i in shown]) if steps > 0 else None


def _title(run: Training) -> str:
    return f"{run.optimizer}, {some(run.steps, 'step')} at {run.learning_rate:g}"
