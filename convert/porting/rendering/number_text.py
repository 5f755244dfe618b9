"""Numbers as people write them: `8**-0.5` for 0.35355339059327373, the very same float."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator

_LONG = 12  # digits from which on a number was computed
_LARGEST = 2**20


class Numbers(ast.NodeTransformer):
    """Writes them so."""

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        """One number, if it is a float that was computed."""
        text = _short(node.value) if isinstance(node.value, float) else None
        return node if text is None else ast.parse(text, mode="eval").body


def _short(value: float) -> str | None:
    digits = repr(value).partition("e")[0].replace(".", "").lstrip("0")
    if len(digits) < _LONG or not 1e-30 < value < 1e30:  # powers of others overflow
        return None
    return next((text for text, x in _forms(value) if x == value), None)


def _forms(value: float) -> Iterator[tuple[str, float]]:
    """Expressions that may have this value, with those that they have."""
    for n in _whole(1 / value):
        yield f"1 / {n}", 1 / n
    for n in _whole(value**-2):
        yield f"{n}**-0.5", n**-0.5
        yield f"1 / math.sqrt({n})", 1 / math.sqrt(n)
    for n in _whole(value**2):
        yield f"math.sqrt({n})", math.sqrt(n)
    for n in _whole(value**-4):
        yield f"{n}**-0.25", n**-0.25
    if value < math.log(_LARGEST):
        for n in _whole(math.exp(value)):
            yield f"math.log({n})", math.log(n)
    yield "math.pi", math.pi
    yield "2 * math.pi", 2 * math.pi
    yield "math.pi / 2", math.pi / 2
    yield "math.sqrt(2 / math.pi)", math.sqrt(2 / math.pi)


def _whole(value: float) -> Iterator[int]:
    """The whole number that is near, if it is no wild one."""
    if 1.5 < value <= _LARGEST:
        yield round(value)
