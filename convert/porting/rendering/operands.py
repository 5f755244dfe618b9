"""What an operation is written of: expressions of arrays and of sizes, as text.

Text is one Python expression. Whoever puts one into another calls `inside`, which adds parentheses
where they could be needed; the file as a whole is unparsed from its syntax tree, which takes those
out again that are not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from convert.program.graph import ArrayType

__all__ = ["ArrayType", "Listed", "Operand", "SizeText", "inside"]
_ATOM = re.compile(r"[\w.]+")


@dataclass(frozen=True, slots=True)
class Operand:
    """An array among the arguments."""

    text: str
    type: ArrayType

    def __str__(self) -> str:
        return inside(self.text)

    @property
    def shape(self) -> tuple[int | str, ...]:
        """See ArrayType."""
        return self.type.shape

    @property
    def dtype(self) -> str:
        """See ArrayType."""
        return self.type.dtype


class Listed(list[Operand]):
    """All arrays of a list that has a name, `text`."""

    def __init__(self, text: str, arrays: Iterable[Operand]) -> None:
        super().__init__(arrays)
        self.text = text


@dataclass(frozen=True, slots=True)
class SizeText:
    """A number that is written as an expression: `x.shape[1]`, `self.heads`. `value` is the number,
    or the expression of the inputs' sizes that it is."""

    text: str
    value: int | float | str

    def __str__(self) -> str:
        return inside(self.text)


def inside(text: str) -> str:
    """The expression as a part of another: in parentheses, unless it is a name or a number."""
    return text if _ATOM.fullmatch(text) else f"({text})"
