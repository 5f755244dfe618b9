"""Statements that repeat over the items of a list, as a loop."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convert.porting.rendering.scopes import children
from convert.porting.rendering.source_lines import source_file
from convert.porting.rendering.statements import Line

_INDEXED = re.compile(r"(self(?:\.\w+)+)\[(\d+)\]")
_LONGEST = 12  # statements of one round


@dataclass
class Loop:
    """`for targets in lists:` with its statements."""

    targets: list[str]
    lists: list[str]
    lines: list[Line]

    def __str__(self) -> str:
        return "\n".join([self.header(), *map(str, self.lines)])

    def header(self) -> str:
        """The line that it begins with."""
        if len(self.lists) == 1:
            return f"for {self.targets[0]} in {self.lists[0]}:"
        return f"for {', '.join(self.targets)} in zip({', '.join(self.lists)}, strict=True):"


@dataclass(frozen=True)
class _Pattern:
    texts: tuple[str, ...]
    lists: tuple[str, ...]
    indexes: tuple[int, ...]


def lengths_of(modules: Mapping[str, Any], path: str) -> dict[str, int]:
    """How many items each part of a module has, by what its code calls it."""
    prefix = f"{path}." if path else ""
    return {
        f"self.{name.removeprefix(prefix)}": len(children(module))
        for name, module in modules.items()
        if name.startswith(prefix) and name != path
    }


def rolled(lines: Sequence[Line], lengths: Mapping[str, int]) -> list[Line | Loop]:
    """The statements with loops where they repeat. `lengths`: how many items a list has."""
    made: list[Line | Loop] = []
    at = 0
    while at < len(lines):
        best = (0, 0)
        for period in range(1, min(_LONGEST, (len(lines) - at) // 2) + 1):
            rounds = _rounds(lines, at, period)
            if rounds >= 2 and rounds * period > best[0] * best[1]:
                best = (period, rounds)
        period, rounds = best
        if not rounds:
            made.append(lines[at])
            at += 1
            continue
        made.append(_loop(lines, at, period, rounds, lengths))
        at += period * rounds
    return made


def _pattern(lines: Sequence[Line]) -> _Pattern:
    lists: dict[str, int] = {}
    texts = []
    for line in lines:
        for m in _INDEXED.finditer(line.text):
            if lists.setdefault(m[1], int(m[2])) != int(m[2]):
                return _Pattern((), (), ())
        plain = _INDEXED.sub(lambda m: f"{m[1]}[]", line.text)
        texts.append(f"{','.join(line.targets)}={plain}" if line.targets else "")
        if line.guard:
            return _Pattern((), (), ())
    if not lists or "" in texts:
        return _Pattern((), (), ())
    return _Pattern(tuple(texts), tuple(lists), tuple(lists.values()))


def _rounds(lines: Sequence[Line], at: int, period: int) -> int:
    """How often the statements from here on repeat, each time with the next items."""
    first = _pattern(lines[at : at + period])
    if not first.lists:
        return 0
    rounds = 1
    while True:
        there = at + rounds * period
        found = _pattern(lines[there : there + period])
        if found.texts != first.texts or found.lists != first.lists:
            return rounds
        if found.indexes != tuple(i + rounds for i in first.indexes):
            return rounds
        rounds += 1


def _loop(
    lines: Sequence[Line], at: int, period: int, rounds: int, lengths: Mapping[str, int]
) -> Loop:
    own = lines[at : at + period]
    found = _pattern(own)
    taken = {t for line in lines for t in line.targets}
    targets = []
    for name in found.lists:
        wanted = _source_name(own, len(found.lists)) or _singular(name.rpartition(".")[2])
        while wanted in taken or wanted in targets:
            wanted += "_"
        targets.append(wanted)
    names = dict(zip(found.lists, targets, strict=True))
    inside = [
        Line(
            line.targets,
            _INDEXED.sub(lambda m: names[m[1]], line.text),
            line.site,
            comment=line.comment,
        )
        for line in own
    ]
    lists = []
    for name, start in zip(found.lists, found.indexes, strict=True):
        whole = start == 0 and lengths.get(name) == rounds
        lists.append(name if whole else f"{name}[{start or ''}:{start + rounds}]")
    return Loop(targets, lists, inside)


def _source_name(lines: Sequence[Line], lists: int) -> str:
    """The name that the source's own loop gives to an item."""
    site = next((line.site for line in lines if line.site is not None), None)
    loop = source_file(site.file).loop_around(site.line) if site is not None else None
    target = loop.target if loop is not None and lists == 1 else None
    if isinstance(target, ast.Tuple) and target.elts:
        target = target.elts[-1]
    return target.id if isinstance(target, ast.Name) else ""


def _singular(name: str) -> str:
    return name[:-1] if name.endswith("s") and len(name) > 2 else "layer"
