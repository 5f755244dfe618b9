"""A plot as data: axes, curves, marks and a key. The template figure.html draws it as SVG.

Positions are percentages, so that plots are as wide as the page, and their text and marks are never
scaled; only curves lie in a stretched view box, with strokes that do not stretch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, decades between them where `log`."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]  # (value, label)
    log: bool = False

    @classmethod
    def decades(cls, values: Iterable[float]) -> Axis:
        """Whole decades around all positive values (within reason), with at most eight labels."""
        logs = [math.log10(v) for v in values if 1e-300 < v < 1e300] or [-7.0]
        low = math.floor(min(logs))
        high = max(math.ceil(max(logs)), low + 2)
        shown = range(low, high + 1, math.ceil((high - low) / 7))
        return cls(10.0**low, 10.0**high, [(10.0**e, decade(e)) for e in shown], log=True)

    @classmethod
    def around(cls, values: Iterable[float]) -> Axis:
        """Linear, around all finite values with a little room."""
        finite = [v for v in values if math.isfinite(v)] or [0.0]
        low, high = min(finite), max(finite)
        room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        low, high = low - room, high + room
        size = 10.0 ** math.floor(math.log10((high - low) / 3))
        size *= next(m for m in (1, 2, 5, 10) if m * size >= (high - low) / 5)
        steps = [i * size for i in range(math.ceil(low / size), math.floor(high / size) + 1)]
        return cls(low, high, [(v, f"{v:.6g}".replace("-", "−")) for v in steps])

    def at(self, value: float) -> float:
        """Percent of the way; what does not fit lies at an end, what is not a number at the far."""
        if math.isnan(value) or value == math.inf:
            return 100.0
        low, high = self.low, self.high
        if self.log:
            low, high = math.log10(low), math.log10(high)
            value = math.log10(value) if value > 0 else low
        return 100 * min(1.0, max(0.0, (value - low) / (high - low)))


@dataclass(frozen=True)
class Mark:
    """A sign of a judged row ("same", "differs", "unjudged"), or a "bar" one unit wide."""

    kind: str
    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Figure:
    """One plot. Curves and their key have names that the style knows: "noise", "limit", ..."""

    title: str
    about: str
    x: Axis
    y: Axis
    curves: Sequence[tuple[str, Curve]] = ()
    marks: Sequence[Mark] = ()
    key: Sequence[tuple[str, str]] = ()  # (a curve's name or a mark's kind, label)
    flag: tuple[float, str] | None = None  # an x that stands out, and what is there

    def left(self, x: float) -> float:
        """Percent from the left."""
        return round(self.x.at(x), 2)

    def top(self, y: float) -> float:
        """Percent from the top."""
        return round(100 - self.y.at(y), 2)

    def points(self, curve: Curve) -> str:
        """A curve in the view box, which is 1000 wide and high."""
        at = ((10 * self.x.at(x), 1000 - 10 * self.y.at(y)) for x, y in curve)
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in at)


def decade(exponent: int) -> str:
    """A power of ten: 10⁻⁷."""
    return "10" + str(exponent).translate(_SUPERSCRIPT)
