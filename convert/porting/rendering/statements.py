"""A statement of a port, and the statements of a call."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from convert.program.graph import CodeLine


@dataclass
class Line:
    """One statement: `targets = text`, or `return text` where there are none. `guard` is the
    condition that it is under: not every instance of the class has it. `comment` stands above
    it."""

    targets: list[str]
    text: str
    site: CodeLine | None = None
    guard: str = ""
    comment: str = ""

    @property
    def is_bare(self) -> bool:
        """Whether it only returns what has a name."""
        return not self.targets and self.text.isidentifier()

    def __str__(self) -> str:
        return f"{', '.join(self.targets)} = {self.text}" if self.targets else f"return {self.text}"


@dataclass
class Body:
    """The statements of a call, its parameters, and the numbers that they take from `self`.
    `source` is how many statements of the source the operations are of."""

    parameters: list[str]
    lines: list[Line] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)
    source: int = 0


def without_dead_copies(lines: Sequence[Line]) -> list[Line]:
    """The statements without those `name = other` whose name nothing mentions before it is given
    anew."""
    kept = []
    for i, line in enumerate(lines):
        copy = line.site is None and line.text.isidentifier() and line.targets
        if not copy or _is_read(line.targets[0], lines[i + 1 :]):
            kept.append(line)
    return kept


def _is_read(name: str, after: Sequence[Line]) -> bool:
    for line in after:
        if name in words(line.text):
            return True
        if name in line.targets and not line.guard:
            return False
    return False


def words(text: str) -> Iterator[str]:
    """The names in a text."""
    yield from re.findall(r"[A-Za-z_]\w*", text)
