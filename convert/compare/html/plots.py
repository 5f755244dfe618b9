"""Plots as inline SVG.

Positions are percentages, so that plots are as wide as the page, and their text and marks are never
scaled; only lines lie in a stretched view box, with strokes that do not stretch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from convert.compare.html.text import decade, number, some, text, times
from convert.compare.report import Training
from convert.judge.noise import MARGIN
from convert.judge.rows import FLOOR, Row

POINTS = 500  # a plot shows no more: of every so many neighbours the farthest from its noise
Curve = Sequence[tuple[float, float]]
_LEGEND = {"same": "within the noise", "differs": "differs", "unjudged": "not judged"}


@dataclass(frozen=True)
class Axis:
    """The vertical axis, from `low` at the bottom to `high`; of decades where `log`."""

    low: float
    high: float
    log: bool = True

    @classmethod
    def decades(cls, values: Iterable[float]) -> Axis:
        """Whole decades around all positive finite values."""
        logs = [math.log10(v) for v in values if 0 < v < math.inf] or [-7.0]
        low, high = math.floor(min(logs)), math.ceil(max(logs))
        return cls(low, max(high, low + 2))

    @classmethod
    def linear(cls, values: Iterable[float]) -> Axis:
        """Around all finite values, with a little room."""
        finite = [v for v in values if math.isfinite(v)] or [0.0]
        low, high = min(finite), max(finite)
        room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(low - room, high + room, log=False)

    def at(self, value: float) -> float:
        """Percent from the top; what does not fit lies on the edge."""
        if math.isnan(value) or value == math.inf:
            return 0.0
        if self.log:
            value = math.log10(value) if value > 0 else self.low
        return 100 - 100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def ticks(self) -> Iterator[tuple[float, str]]:
        """(percent from the top, label), no more than eight."""
        span = self.high - self.low
        if self.log:
            step = math.ceil(span / 7)
            for exponent in range(int(self.low), int(self.high) + 1, step):
                yield 100 - 100 * (exponent - self.low) / span, decade(exponent)
            return
        size = 10.0 ** math.floor(math.log10(span / 3))
        size *= next(m for m in (1, 2, 5, 10) if m * size >= span / 5)
        for i in range(math.ceil(self.low / size), math.floor(self.high / size) + 1):
            yield 100 - 100 * (i * size - self.low) / span, f"{i * size:.6g}".replace("-", "−")


def depth(rows: Sequence[Row], what: str) -> str:
    """Error of each row beside its noise, both as fractions of its largest value."""
    kept = list(_thinned(rows))
    if not kept:
        return ""
    floors = [max(r.noise / r.scale, FLOOR) if r.scale else FLOOR for r in kept]
    errors = [r.error / r.scale if r.scale else r.error and math.inf for r in kept]
    axis = Axis.decades([*floors, *(MARGIN * f for f in floors), *errors])
    xs = [100 * (i + 0.5) / len(kept) for i in range(len(kept))]
    limit = list(zip(xs, (MARGIN * f for f in floors), strict=True))
    limit = [(0.0, limit[0][1]), *limit, (100.0, limit[-1][1])]
    noise = [(x, y / MARGIN) for x, y in limit]
    lines = [
        _area(axis, limit, "band"),
        _line(axis, limit, "limit"),
        _line(axis, noise, "noise"),
        _line(axis, list(zip(xs, errors, strict=True)), "trace"),
    ]
    marks = [_mark(x, axis.at(e), r) for x, e, r in zip(xs, errors, kept, strict=True)]
    first = next((i for i, r in enumerate(kept) if r.judged and not r.same), None)
    flag = "" if first is None else _flag(xs[first], kept[first].name)
    thinned = (
        f", the farthest of every {math.ceil(len(rows) / POINTS)}" if len(kept) < len(rows) else ""
    )
    legend = [(k, v) for k, v in _LEGEND.items() if any(_kind(r) == k for r in kept)]
    return _figure(
        f"Error by depth, {what}",
        f"Largest error as a fraction of the tensor’s largest value, in the order of execution"
        f"{thinned}. The shaded part is what rounding explains: {MARGIN:g} times the noise.",
        _plot(axis, lines, [flag, *marks], [(0, "first"), (100, f"last of {len(rows):,}")]),
        [*legend, ("line noise", "rounding noise"), ("line limit", f"{MARGIN:g} × noise")],
    )


def histogram(rows: Sequence[Row]) -> str:
    """Elements of all rows by the decade of their error, as a fraction of the scale."""
    all_bins = [r.statistics.bins for r in rows if r.statistics]
    count = max(map(len, all_bins), default=0)
    sums = [sum(b[i] for b in all_bins if i < len(b)) for i in range(count)]
    used = [i for i, n in enumerate(sums) if n and i]
    if not any(sums):
        return ""
    # The first bin, of what is equal, then the decades that hold something.
    shown = [0, *(range(used[0], used[-1] + 1) if used else ())]
    axis = Axis(0, max(1, math.ceil(math.log10(max(sums) + 1))))
    width = 100 / len(shown)
    bars = [_bar(width * i, width, axis, sums[b], _bin(b, count)) for i, b in enumerate(shown)]
    every = max(1, math.ceil(len(shown) / 7))
    ticks = [(width / 2, "equal")]
    ticks += [
        (width * i, decade(b - 20))
        for i, b in list(enumerate(shown))[2 + len(shown) // 11 :: every]
    ]
    return _figure(
        "Histogram of errors",
        f"{some(sum(sums), 'element')} of all outputs and intermediates, by the decade of the "
        "error as a fraction of the tensor’s largest value.",
        _plot(axis, [], bars, ticks),
        [],
    )


def _bar(x: float, width: float, axis: Axis, count: int, what: str) -> str:
    if not count:
        return ""
    top = axis.at(max(count, 1.25))  # a single element is seen too
    return (
        f'<rect class="bar" x="{x + width * 0.06:.2f}%" y="{top:.2f}%" '
        f'width="{width * 0.88:.2f}%" height="{100 - top:.2f}%">'
        f"<title>{text(some(count, 'element'))} {what}</title></rect>"
    )


def losses(t: Training) -> str:
    """The loss of both sides over the steps, and the gap between them beside torch's own."""
    curves = {k: list(enumerate(v)) for k, v in t.losses.items()}
    steps = max((len(v) for v in t.losses.values()), default=0) - 1
    if steps < 1:
        return ""

    def spread(points: Curve) -> Curve:
        return [(100 * i / steps, y) for i, y in points]

    axis = Axis.linear(y for c in curves.values() for _, y in c)
    classes = {"a float64": "exact", "a float32": "side-a", "b float32": "side-b"}
    lines = [_line(axis, spread(curves[k]), c) for k, c in classes.items() if k in curves]
    ticks = [(100 * i / steps, str(i)) for i in range(0, steps + 1, math.ceil(steps / 10))]
    title = text(f"{t.optimizer}, {some(t.steps, 'step')} at {t.learning_rate:g}")
    loss = _figure(
        f"Loss: {title}",
        "Before the first step and after each.",
        _plot(axis, lines, [], ticks),
        [(f"line {c}", text(k)) for k, c in classes.items() if k in curves],
    )
    return f'<div class="pair">{loss}{_gap(t, spread, ticks, title)}</div>'


def _gap(
    t: Training, spread: Callable[[Curve], Curve], ticks: list[tuple[float, str]], title: str
) -> str:
    """|a - b| of the losses beside |float32 - float64| of the reference."""
    if not {"a float32", "b float32", "a float64"} <= t.losses.keys():
        return ""
    a, b, exact = (t.losses[k] for k in ("a float32", "b float32", "a float64"))
    between = [(i, abs(x - y)) for i, (x, y) in enumerate(zip(a, b, strict=False))]
    own = [(i, abs(x - y)) for i, (x, y) in enumerate(zip(a, exact, strict=False))]
    # The curve is judged as a whole, as its row says.
    row = next((r for r in t.rows if r.name == "loss"), None)
    noise = max(y for _, y in own) if row is None else row.noise
    scale = max(map(abs, exact)) if row is None else row.scale
    limit = MARGIN * max(noise, FLOOR * scale)
    axis = Axis.decades([limit, *(y for c in (between, own) for _, y in c)])
    lines = [
        _area(axis, [(0, limit), (100, limit)], "band"),
        _line(axis, [(0, limit), (100, limit)], "limit"),
        _line(axis, spread(own), "noise"),
        _line(axis, spread(between), "trace"),
    ]
    dots = [
        f'<circle class="{"same" if y <= limit else "differs"}" cx="{x:.2f}%" '
        f'cy="{axis.at(y):.2f}%" r="3"><title>{number(y)}</title></circle>'
        for x, y in spread(between)
    ]
    return _figure(
        f"Gap of the losses: {title}",
        f"The shaded part is {MARGIN:g} times PyTorch’s own largest gap, float32 to float64.",
        _plot(axis, lines, dots, ticks),
        [("same", "between the two"), ("line noise", "PyTorch’s own")],
    )


def small_histogram(bins: Sequence[int]) -> str:
    """The bins of one tensor as a silhouette, heights by the logarithm of the count."""
    top = math.log10(max(bins, default=0) + 1) or 1.0
    path = "".join(f"V{10 - 10 * math.log10(n + 1) / top:.1f}h1" for n in bins)
    return (
        f'<svg class="bins" viewBox="0 0 {len(bins)} 10" preserveAspectRatio="none" '
        f'aria-hidden="true"><path d="M0 10{path}V10z"/></svg>'
    )


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


def _kind(row: Row) -> str:
    return "unjudged" if not row.judged else "same" if row.same else "differs"


def _mark(x: float, y: float, row: Row) -> str:
    kind = _kind(row)
    told = f"{row.name}: error {number(row.error)}, {times(row.ratio)} × noise"
    return (
        f'<use class="{kind}" href="#mark-{kind}" x="{x:.2f}%" y="{y:.2f}%">'
        f"<title>{text(told)}</title></use>"
    )


def _flag(x: float, label: str) -> str:
    """A line at the first row that differs, with the end of its name."""
    short = label if len(label) <= 22 else "…" + label[-21:]
    side = "start" if x < 50 else "end"
    return (
        f'<line class="first" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="100%"/>'
        f'<text class="first" x="{x:.2f}%" y="0" dx="{6 if x < 50 else -6}" dy="12" '
        f'text-anchor="{side}">{text(short)}</text>'
    )


def _points(axis: Axis, curve: Curve) -> str:
    return " ".join(f"{10 * x:.1f},{10 * axis.at(y):.1f}" for x, y in curve)


def _line(axis: Axis, curve: Curve, kind: str) -> str:
    return f'<polyline class="{kind}" points="{_points(axis, curve)}"/>'


def _area(axis: Axis, curve: Curve, kind: str) -> str:
    """Everything below a curve."""
    left, right = 10 * curve[0][0], 10 * curve[-1][0]
    points = f"{left:.1f},1000 {_points(axis, curve)} {right:.1f},1000"
    return f'<polygon class="{kind}" points="{points}"/>'


def _plot(
    axis: Axis, lines: Sequence[str], marks: Sequence[str], ticks: Sequence[tuple[float, str]]
) -> str:
    y_ticks = list(axis.ticks())
    labels = "".join(f'<text x="100%" y="{y:.2f}%" dy="4">{t}</text>' for y, t in y_ticks)
    grid = "".join(
        f'<line class="grid" x2="100%" y1="{y:.2f}%" y2="{y:.2f}%"/>' for y, _ in y_ticks
    )
    edges = {0.0: ' class="start"', 100.0: ' class="end"'}
    below = "".join(f'<span style="--x:{x:.2f}%"{edges.get(x, "")}>{t}</span>' for x, t in ticks)
    stretched = (
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none">{"".join(lines)}</svg>'
        if lines
        else ""
    )
    return (
        f'<svg class="y">{labels}</svg>'
        f'<svg class="area">{grid}{stretched}{"".join(marks)}</svg><div class="x">{below}</div>'
    )


def _figure(title: str, about: str, plot: str, legend: Sequence[tuple[str, str]]) -> str:
    keys = "".join(f"<li>{_key(kind)}{label}</li>" for kind, label in legend)
    listed = f'<ul class="legend">{keys}</ul>' if keys else ""
    return (
        f"<figure><figcaption><h3>{title}</h3><p>{about}</p></figcaption>"
        f'<div class="plot" role="img" aria-label="{title}. The table below has its numbers.">'
        f"{plot}</div>{listed}</figure>"
    )


def _key(kind: str) -> str:
    if kind.startswith("line "):
        body = f'<line class="{kind[5:]}" x1="0" x2="22" y1="6" y2="6"/>'
    else:
        body = f'<use class="{kind}" href="#mark-{kind}" x="11" y="6"/>'
    return f'<svg class="key" width="22" height="12" aria-hidden="true">{body}</svg>'


# The marks differ by shape, not only by colour.
MARKS = (
    '<svg width="0" height="0" aria-hidden="true" class="marks"><defs>'
    '<circle id="mark-same" r="3"/>'
    '<path id="mark-differs" d="M-4.5 -4.5L4.5 4.5M-4.5 4.5L4.5 -4.5"/>'
    '<circle id="mark-unjudged" r="3"/>'
    "</defs></svg>"
)
