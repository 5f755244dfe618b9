"""The same code run several times: layers of a stack, a rotation of queries and of keys.

A mistake in the code is made in every run. An edit of one run is carried over to the others, whose
operations are the same, one by one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from convert.diagnose.repair.edit import Edit
from convert.program.operations import Operation, Program
from convert.program.replay import At, Change

_MORE = 0.08  # what an edit of all runs costs more than one of a single run


class Parallels:
    """Calls of functions that ran the same operations."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._known: dict[tuple[int, int], tuple[dict[int, int], dict[int, int]]] = {}
        self._inside: dict[int, list[int]] = defaultdict(list)  # call -> operations
        for i, operation in enumerate(program.operations):
            for call in operation.site.calls if operation.site else ():
                self._inside[call].append(i)
        alike: dict[Any, list[int]] = defaultdict(list)
        for call, indices in self._inside.items():
            sites = (program.operations[i] for i in indices)
            alike[tuple((o.site and o.site.position, o.function) for o in sites)].append(call)
        self._others = {c: calls for calls in alike.values() if len(calls) > 1 for c in calls}

    def of(self, edit: Edit) -> Iterator[Edit]:
        """The edit in all runs of the innermost call around it that has such, and in all of the
        outermost."""
        if edit.leaves or edit.free is not None or not edit.changes:
            return
        sites = [self.program.operations[i].site for i in edit.changes]
        if any(site is None for site in sites):
            return
        shared = set.intersection(*(set(site.calls) for site in sites if site))
        calls = sorted((c for c in shared if c in self._others), key=lambda c: len(self._inside[c]))
        done = set()
        for call in calls[:1] + calls[-1:]:
            if call != self._others[call][0]:
                continue  # told of the first run
            changes = dict(edit.changes)
            for other in self._others[call][1:]:
                changes |= self._carried(edit.changes, call, other)
            if frozenset(changes) not in done:
                done.add(frozenset(changes))
                yield replace(edit, changes=changes, cost=edit.cost + _MORE, at=edit.place)

    def _carried(self, changes: Mapping[int, Change], call: int, other: int) -> dict[int, Change]:
        places, values = self._names(call, other)
        operations = self.program.operations
        return {places[i]: translated(c, operations[i], values) for i, c in changes.items()}

    def _names(self, call: int, other: int) -> tuple[dict[int, int], dict[int, int]]:
        """The operations and the values of one run, and what they are in the other."""
        if (call, other) not in self._known:
            operations = self.program.operations
            places = dict(zip(self._inside[call], self._inside[other], strict=True))
            values: dict[int, int] = {}
            for here, there in places.items():
                a, b = operations[here], operations[there]
                values |= dict(zip(a.refs, b.refs, strict=False))
                values |= dict(zip(a.made, b.made, strict=False))
            self._known[call, other] = places, values
        return self._known[call, other]


def translated(change: Change, operation: Operation, values: Mapping[int, int]) -> Change:
    """The change of an operation of one run, with the values of another."""

    def elsewhere(at: At) -> Any:
        return change(At(operation, at.args, at.kwargs, _Renamed(at.values, values)))

    return elsewhere


class _Renamed(dict[int, Any]):
    """Values under the numbers of another run."""

    def __init__(self, held: Mapping[int, Any], names: Mapping[int, int]) -> None:
        super().__init__()
        self.held, self.names = held, names

    def __missing__(self, value: int) -> Any:
        return self.held[self.names.get(value, value)]
