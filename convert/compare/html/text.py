"""Values as text of an HTML page. Nothing from a report reaches the page but through here."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import Any

from zoo.containers.errors import printable

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def text(value: Any) -> str:
    """Any value, escaped: what could end a tag, move a cursor or reorder text is written out."""
    return html.escape(printable(str(value)))


def name(value: str) -> str:
    """A tensor's or layer's name; lines may break after its dots."""
    return "<wbr>".join(f"{part}" for part in text(value).replace(".", ".\0").split("\0"))


def code(value: str) -> str:
    """A name within a sentence."""
    return f"<code>{name(value)}</code>" if value else "<em>the whole model</em>"


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


def size(nbytes: int) -> str:
    """Bytes in powers of ten."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def shape(sizes: tuple[int, ...]) -> str:
    """2×8×384."""
    return "×".join(map(str, sizes)) if sizes else "scalar"


def decade(exponent: int) -> str:
    """A power of ten: 10⁻⁷."""
    return "10" + str(exponent).translate(_SUPERSCRIPT)


def some(count: int, one: str, many: str | None = None) -> str:
    """A count with its noun: "1 tensor", "1,204 tensors"."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def definitions(pairs: Mapping[str, str]) -> str:
    """A list of terms, and of what they are: HTML already. Empty ones are left out."""
    items = "".join(f"<div><dt>{text(k)}</dt><dd>{v}</dd></div>" for k, v in pairs.items() if v)
    return f"<dl>{items}</dl>" if items else ""
