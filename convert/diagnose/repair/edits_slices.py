"""Slices that together are a whole axis, lying in another order along it."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from convert.diagnose.repair.edit import Edit, Node, with_scalar
from convert.program.operations import Program
from convert.program.replay import At, Change, Values, resolve

_MOST = 4  # parts of which all orders are tried
Order = tuple[int, ...]


@dataclass(frozen=True)
class _Part:
    """A slice of the last axis; without an operation where the program does not need it."""

    start: int
    stop: int
    node: Node | None = None


@dataclass(frozen=True)
class _Whole:
    """The slices of one value that make its last axis, as they lie, and where they stand in the
    code."""

    parts: tuple[_Part, ...]

    @property
    def sites(self) -> tuple[Any, ...]:
        return tuple(_site(p.node) for p in self.parts)

    def lying(self, order: Order) -> dict[int, Change]:
        """Each slice taken from where it would be in that order."""
        start, changes = 0, {}
        for part in (self.parts[k] for k in order):
            stop = start + part.stop - part.start
            if part.node is not None:
                index = part.node.operation.args[1][:-1]
                changes[part.node.index] = with_scalar((1,), (*index, slice(start, stop)))
            start = stop
        return changes


def slices(program: Program, values: Values) -> Iterator[Edit]:
    """Those of one value; all that are joined again; and the same code's of several values."""
    wholes, rest = _wholes(program, values)
    joined: dict[Order, dict[int, Change]] = defaultdict(dict)
    for whole in wholes:
        for order in _orders(len(whole.parts)):
            changes = whole.lying(order)
            said = f"the parts lying in the order {order}"
            yield Edit(1.05, "blocks", said, changes)
            if (joins := _joins(program, max(changes), len(order))) is not None:
                again = {**changes, joins: _in_order(order)}
                joined[order] |= again
                yield Edit(1.1, "rearranged", f"{said}, and joined so", again)
    for order, changes in joined.items():
        said = f"all parts lying in the order {order}, and joined so"
        yield Edit(1.1, "rearranged", said, changes)
    alike: dict[tuple[Any, ...], list[_Whole]] = defaultdict(list)
    for sites, whole in ((w.sites, w) for w in wholes):
        alike[sites].append(whole)
    for sites, whole in _completed(wholes, rest):
        alike[sites].append(whole)
    for same in alike.values():
        for order in _orders(len(same[0].parts)) if len(same) > 1 else ():
            changes = {i: c for whole in same for i, c in whole.lying(order).items()}
            yield Edit(1.1, "blocks", f"the parts lying in the order {order}, each time", changes)


def _orders(count: int) -> Iterator[Order]:
    """Every order but the one that there is."""
    return itertools.islice(itertools.permutations(range(count)), 1, None)


def _site(node: Node | None) -> Any:
    site = node.operation.site if node is not None else None
    return site.position if site is not None else None


def _wholes(program: Program, values: Values) -> tuple[list[_Whole], list[tuple[_Part, int]]]:
    """Slices that make a whole axis; and those that are the only one of their value, with the size
    of the axis."""
    taken: dict[Any, list[_Part]] = defaultdict(list)
    sizes: dict[Any, int] = {}
    for i, operation in enumerate(program.operations):
        node = Node(i, operation, program, values)
        if operation.name != "getitem" or len(operation.args) < 2 or not operation.refs:
            continue
        index = operation.args[1] if isinstance(operation.args[1], tuple) else None
        if index and isinstance(index[-1], slice) and index[-1] != slice(None):
            key = operation.refs[0], str(index[:-1])
            sizes[key] = node.tensors[0].shape[-1]
            start, stop, _ = index[-1].indices(sizes[key])
            taken[key].append(_Part(start, stop, node))
    found, rest = [], []
    for key, parts in taken.items():
        lying = sorted(parts, key=lambda p: (p.start, p.stop))
        ends = [0, *(p.stop for p in lying)]
        if 1 < len(lying) <= _MOST and [p.start for p in lying] + [sizes[key]] == ends:
            found.append(_Whole(tuple(lying)))
        elif len(lying) == 1:
            rest.append((lying[0], sizes[key]))
    return found, rest


def _completed(
    wholes: list[_Whole], rest: list[tuple[_Part, int]]
) -> Iterator[tuple[tuple[Any, ...], _Whole]]:
    """Single slices as one of two parts, where the same code takes both of another value: what is
    made of the other one here is not on the way to the result."""
    pairs = {w.sites for w in wholes if len(w.parts) == 2}
    for (part, size), sites in itertools.product(rest, pairs):
        if _site(part.node) == sites[0] and part.start == 0:
            yield sites, _Whole((part, _Part(part.stop, size)))
        elif _site(part.node) == sites[1] and part.stop == size:
            yield sites, _Whole((_Part(0, part.start), part))


def _joins(program: Program, after: int, count: int) -> int | None:
    """The next operation that joins as many parts along the last axis again."""
    for i, operation in enumerate(program.operations[after + 1 :], after + 1):
        if operation.name in ("cat", "concat") and len(operation.refs) == count:
            return i
    return None


def _in_order(order: Order) -> Change:
    def change(at: At) -> Any:
        parts = [at.args[0][i] for i in order]
        return resolve(at.operation.function)(parts, *at.args[1:], **at.kwargs)

    return change
