"""How a header differs from a layout, in words."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from difflib import get_close_matches

from zoo.layout import Shape

_SHOWN = 10  # problems of one kind that an error spells out


@dataclass
class Problems:
    """How a header differs from a layout."""

    missing: dict[str, Shape] = field(default_factory=dict)
    surplus: list[str] = field(default_factory=list)
    misshaped: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)  # found, expected

    def __len__(self) -> int:
        return len(self.missing) + len(self.surplus) + len(self.misshaped)

    def lines(self) -> list[str]:
        """One line a problem, with the nearest name where a name may be misspelt.

        Of each kind the first are spelled out, and the rest counted.
        """
        missing = [
            f"missing: {n} {dims(s)}{_near(n, self.surplus)}"
            for n, s in itertools.islice(self.missing.items(), _SHOWN)
        ]
        surplus = [f"surplus: {n}" for n in self.surplus[:_SHOWN]]
        misshaped = [
            f"wrong shape: {n} is {dims(got)}, should be {dims(want)}"
            for n, (got, want) in itertools.islice(self.misshaped.items(), _SHOWN)
        ]
        counts = len(self.missing), len(self.surplus), len(self.misshaped)
        lines: list[str] = []
        for kind, n in zip((missing, surplus, misshaped), counts, strict=True):
            lines += kind
            if n > len(kind):
                lines.append(f"{kind[0].partition(':')[0]}: ... and {n - len(kind)} more")
        return lines


def dims(shape: Shape) -> str:
    """A shape for people: 30522x384."""
    return "x".join(map(str, shape)) if shape else "scalar"


def _near(name: str, surplus: list[str]) -> str:
    near = get_close_matches(name, surplus, 1, 0.8)
    return f" (nearest: {near[0]})" if near else ""
