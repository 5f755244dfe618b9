"""Numbers as people read them. The page escapes what it shows, these too."""

from __future__ import annotations

import math


def number(value: float | None) -> str:
    """Two significant digits: 1.2e-7."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")


def times(ratio: float) -> str:
    """How many times something: 0.83, 12.4, 4,120, 3.1e6."""
    if not math.isfinite(ratio) or ratio >= 1e6:
        return number(ratio)
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:,.0f}"


def plain(value: float) -> str:
    """Four significant digits, as a statistic is read: 0.0123, -3.142, 1.2e-7."""
    if not math.isfinite(value) or (value and not 1e-3 <= abs(value) < 1e5):
        return number(value)
    return f"{value:.4g}".replace("-", "−")


def some(count: int, noun: str) -> str:
    """A count with its noun: "1 tensor", "1,204 tensors"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def listed(items: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(items[:-1]), *items[-1:])))
