"""Loops: one expression that runs several times in one call of a function.

A mistake in it is made in every turn; and it may take what the turn before has made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from convert.diagnose.repair.edit import Edit, named, with_values
from convert.diagnose.repair.parallel import translated
from convert.program.operations import Program
from convert.program.replay import Change, Values

Key = tuple[Any, ...]


class Loops:
    """The turns of each expression: operations that stand in one place of one call."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.turns: dict[Key, list[int]] = defaultdict(list)
        self.key: dict[int, Key] = {}
        for index, operation in enumerate(program.operations):
            site = operation.site
            if site is not None:
                self.key[index] = key = (site.position, site.calls, operation.name)
                self.turns[key].append(index)

    def several(self, changes: Mapping[int, Change]) -> Iterator[dict[int, Change]]:
        """The changes of operations in one turn, made in every turn."""
        keys = [self.key.get(i) for i in changes]
        runs = [self.turns[k] for k in keys if k is not None]
        if len(runs) < len(changes) or len({len(r) for r in runs}) != 1 or len(runs[0]) < 2:
            return
        if len(set(map(id, runs))) < len(runs) or any(
            run[0] != i for run, i in zip(runs, changes, strict=True)
        ):
            return  # not once in each turn, or not told of the first one
        made = dict(changes)
        for turn in range(1, len(runs[0])):
            names = self._names(runs, turn)
            for run, (_, change) in zip(runs, list(changes.items()), strict=True):
                first = self.program.operations[run[0]]
                made[run[turn]] = translated(change, first, names)
        yield made

    def _names(self, runs: list[list[int]], turn: int) -> dict[int, int]:
        """The values of the first turn, and what they are in this one."""
        calls = {self.key[r[0]][1] for r in runs}
        names: dict[int, int] = {}
        operations = self.program.operations
        for key, turns in self.turns.items():
            if key[1] in calls and len(turns) == len(runs[0]):
                a, b = operations[turns[0]], operations[turns[turn]]
                names |= dict(zip(a.refs, b.refs, strict=False))
                names |= dict(zip(a.made, b.made, strict=False))
        return names


def carried(program: Program, values: Values) -> Iterator[Edit]:
    """An operation of a loop that takes what the turn before has made, or what the next one
    takes."""
    loops = Loops(program)
    for turns in loops.turns.values():
        if len(turns) < 2:
            continue
        first = program.operations[turns[0]]
        for k, ref in enumerate(first.refs):
            refs = [program.operations[i].refs[k] for i in turns if k < len(
                program.operations[i].refs)]  # fmt: skip
            if len(refs) < len(turns) or len(set(refs)) < 2:
                continue
            begun = _begun(program, loops, ref, turns)
            if begun is None or not _like(values, begun, ref):
                continue
            before = [begun, *refs[:-1]]
            changes = {i: _taking(r, b) for i, r, b in zip(turns, refs, before, strict=True)}
            said = f"{named(program, ref)} of the step before, in every step"
            yield Edit(1.15, "operand", said, changes, at=turns[0])


def _begun(program: Program, loops: Loops, value: int, turns: list[int]) -> int | None:
    """What a value that a loop makes anew was before its first turn: what the second turn takes
    where the first one took that."""
    for users in loops.turns.values():
        if len(users) != len(turns):
            continue
        one, two = (program.operations[users[t]].refs for t in (0, 1))
        for a, b in zip(one, two, strict=False):
            if b == value and a != value:
                return a
    return None


def _like(values: Values, a: int, b: int) -> bool:
    x, y = values.get(a), values.get(b)
    return x is not None and y is not None and x.shape == y.shape and x.dtype == y.dtype


def _taking(old: int, new: int) -> Change:
    return lambda at: with_values(at, {old: at.values[new]})
