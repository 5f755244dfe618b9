"""Other names for the same modules, stated as pairs of templates; both directions are derived.

    Renames((("layer{s+1}.{i}.conv{k+1}", "stages.{s}.layers.{i}.layer.{k}.convolution"), ...))

A template is the dotted path of a module, or the beginning of one. `{s}` is a whole number, counted
from 0; `{s+1}` is the same number where names count from 1.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

_NUMBER = re.compile(r"\{([a-z])(?:\+(\d))?\}")
_DIGITS = re.compile(r"\d+")

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Renames:
    """Pairs of templates: ours, and theirs in the order in which they define their modules. The
    first pair that a name begins with decides; what begins with none keeps its name."""

    pairs: Pairs

    def __post_init__(self) -> None:
        for ours, theirs in _templates(self.pairs):
            if sorted(x for x, _ in ours.letters) != sorted(x for x, _ in theirs.letters):
                raise ValueError(f"{ours.text} and {theirs.text} have other numbers")

    def forth(self, name: str) -> str:
        """Our name as they have it."""
        return next((new for a, b in _templates(self.pairs) if (new := a.into(b, name))), name)

    def back(self, name: str) -> str:
        """Their name as we have it."""
        return next((new for a, b in _templates(self.pairs) if (new := b.into(a, name))), name)

    def place(self, name: str) -> tuple[int, ...]:
        """Where one of their names stands among all, in the order of their modules: to sort by."""
        ranks, parts = _ranks(self.pairs), name.split(".")
        return tuple(
            int(part)
            if part.isdecimal()
            else ranks.get(_DIGITS.sub("#", ".".join(parts[: i + 1])), len(ranks))
            for i, part in enumerate(parts)
        )


def below_collection(rename: Callable[[str], str], name: str) -> str:
    """A name renamed, but for the Linen collection that it begins with."""
    head, dot, rest = name.partition(".")
    return f"{head}{dot}{rename(rest)}"


@dataclass(frozen=True, slots=True)
class _Template:
    text: str
    pattern: re.Pattern[str]
    letters: tuple[tuple[str, int], ...]  # each number's letter, and where it is counted from

    @classmethod
    def of(cls, text: str) -> _Template:
        literal = _NUMBER.split(text)[::3]
        letters = tuple((m[1], int(m[2] or 0)) for m in _NUMBER.finditer(text))
        body = r"(0|[1-9]\d{0,5})".join(map(re.escape, literal))
        return cls(text, re.compile(rf"{body}(?=\.|$)"), letters)

    def into(self, other: _Template, name: str) -> str:
        """A name that begins with this template, with the other in its place; "" for any else."""
        if (m := self.pattern.match(name)) is None:
            return ""
        numbers = {a: int(n) - b for (a, b), n in zip(self.letters, m.groups(), strict=True)}
        if min(numbers.values(), default=0) < 0:
            return ""
        begin = _NUMBER.sub(lambda n: str(numbers[n[1]] + int(n[2] or 0)), other.text)
        return begin + name[m.end() :]


@functools.cache
def _templates(pairs: Pairs) -> list[tuple[_Template, _Template]]:
    return [(_Template.of(ours), _Template.of(theirs)) for ours, theirs in pairs]


@functools.cache
def _ranks(pairs: Pairs) -> dict[str, int]:
    """Each beginning of their templates, numbers aside, in order."""
    ranks: dict[str, int] = {}
    for _, theirs in pairs:
        parts = _DIGITS.sub("#", _NUMBER.sub("#", theirs)).split(".")
        for i in range(len(parts)):
            ranks.setdefault(".".join(parts[: i + 1]), len(ranks))
    return ranks
