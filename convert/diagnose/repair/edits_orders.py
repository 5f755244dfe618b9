"""Whole stretches of a computation: left out, given another value, done earlier or later."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from convert.diagnose.repair.edit import Edit, named, short, with_values
from convert.diagnose.repair.edits_siblings import activations
from convert.diagnose.repair.edits_values import LATELY, taken_for
from convert.diagnose.repair.words import of_bypass, of_name
from convert.program.operations import Program
from convert.program.replay import At, Change, Values, execute

_MOVED = 24  # places before or after to which a stretch is moved


@dataclass
class Stretch:
    """Operations that take one value from outside that matters, and give one: one operation, a
    fused one by its steps, or a call of a function or module of the user's."""

    name: str
    indices: list[int]
    taken: list[int]  # values from outside
    given: int  # the value that it gives
    maker: int  # the operation that makes it

    def on(self, program: Program, incoming: int, x: Any, at: At) -> Any:
        """What the stretch gives where `incoming` is x."""
        import torch

        local = {incoming: x}

        class Both(dict[int, Any]):
            def __missing__(self, key: int) -> Any:
                return local[key] if key in local else at.values[key]

        values = Both()
        for index in self.indices:
            operation = program.operations[index]
            output = execute(operation, values)
            made = [output] if isinstance(output, torch.Tensor) else list(output)
            local.update(zip(operation.made, made, strict=False))
        return local[self.given]


def stretches(program: Program, near: frozenset[int] = frozenset()) -> list[Stretch]:
    """Every stretch: single operations, fused ones, calls of functions. With `near` those that end
    in one of these operations."""
    calls: dict[int, list[int]] = defaultdict(list)
    sites: dict[Any, list[int]] = defaultdict(list)
    found: list[Stretch] = []
    for index, operation in enumerate(program.operations):
        site = operation.site
        for call in site.calls[1:] if site else ():
            calls[call].append(index)
        sites[(site.position, site.calls) if site else index].append(index)
    single = [[i] for i in range(len(program.operations))]
    fused = [indices for indices in sites.values() if len(indices) > 1]
    functions = [indices for indices in calls.values() if len(indices) > 1]
    for kind, groups in (
        ("one", single), ("fused", fused), ("function", functions), ("chain", _chains(program)),
    ):  # fmt: skip
        for indices in groups:
            if near and indices[-1] not in near:
                continue
            if (borders := _borders(program, indices)) is not None:
                found.append(Stretch(_title(program, indices, kind), indices, *borders))
    return found


def _chains(program: Program) -> list[list[int]]:
    """Two to four operations that follow each other, each of one value: a soft cap."""
    makers = program.makers
    found = []
    for index in range(len(program.operations)):
        chain = [index]
        while len(chain) < 4:
            refs = program.operations[chain[0]].refs
            before = makers.get(refs[0]) if len(refs) == 1 else None
            if before is None or len(program.operations[before].refs) != 1:
                break
            chain.insert(0, before)
            found.append(list(chain))
    return found


def _title(program: Program, indices: list[int], kind: str) -> str:
    operation = program.operations[indices[0]]
    if kind == "function" and operation.site is not None:
        return operation.site.function
    if kind == "chain":
        return " and ".join(program.operations[i].name for i in indices)
    if kind == "fused" and operation.site is not None:
        return f"`{short(operation.site.text, 40)}`"
    return operation.name


def _borders(program: Program, indices: list[int]) -> tuple[list[int], int, int] | None:
    """What operations take from outside, the one value that they give, and who makes it."""
    held = set(indices)
    made = {v for i in indices for v in program.operations[i].made}
    outgoing = [
        v for v in made if v == program.target or not held.issuperset(program.users.get(v, ()))
    ]
    if len(outgoing) != 1:
        return None
    taken = [r for i in indices for r in program.operations[i].refs if r not in made]
    maker = next(i for i in indices if outgoing[0] in program.operations[i].made)
    return list(dict.fromkeys(taken)), outgoing[0], maker


def functions(
    program: Program, values: Values, near: frozenset[int] = frozenset()
) -> Iterator[Edit]:
    """A stretch left out, or given another value for one that it takes."""
    for stretch in stretches(program, near):
        if len(stretch.indices) < 2:
            continue
        for value in stretch.taken:
            if _like(values, value, stretch.given):
                yield Edit(1.0, of_name(stretch.name), f"no {stretch.name} here",
                           {stretch.maker: _handed_on(value)}, omits=True)  # fmt: skip
        yield from _other_arguments(program, values, stretch)
        yield from _other_activation(program, values, stretch)


def _handed_on(value: int) -> Change:
    return lambda at: at.values[value]


def _other_activation(program: Program, values: Values, stretch: Stretch) -> Iterator[Edit]:
    """An activation in place of a stretch of one value, as a hard sigmoid is written out."""
    moving = [v for v in stretch.taken if v not in program.leaves
              or program.leaves[v].kind in ("layer", "input")]  # fmt: skip
    if len(moving) != 1 or len(stretch.taken) != 1 or not _like(values, moving[0], stretch.given):
        return
    if not values[moving[0]].is_floating_point() or len(stretch.indices) > 8:
        return
    for said, function in activations().items():

        def change(at: At, function: Any = function) -> Any:
            return function(at.values[moving[0]])

        yield Edit(1.35, "activation", f"{said} in place of {stretch.name}",
                   {stretch.maker: change})  # fmt: skip


def _other_arguments(program: Program, values: Values, stretch: Stretch) -> Iterator[Edit]:
    """One value in place of another, wherever the stretch takes it."""
    before = [v for o in program.operations[: stretch.indices[0]] for v in o.made][-LATELY:]
    for old in stretch.taken:
        for new in (*program.leaves, *before):
            if new == old or not _like(values, new, old):
                continue

            def change(at: At, old: int = old, new: int = new) -> Any:
                return with_values(at, {old: at.values[new]})

            users = [i for i in stretch.indices if old in program.operations[i].refs]
            said = f"another argument of {stretch.name}: {named(program, new)} " \
                   f"in place of {named(program, old)}"  # fmt: skip
            why = of_bypass(program, new, old, users) or taken_for(program, old, new)
            yield Edit(1.5, why, said, dict.fromkeys(users, change))
    same = [(a, b) for i, a in enumerate(stretch.taken) for b in stretch.taken[i + 1 :]
            if _like(values, a, b)]  # fmt: skip
    for a, b in same:

        def exchange(at: At, a: int = a, b: int = b) -> Any:
            return with_values(at, {a: at.values[b], b: at.values[a]})

        users = [i for i in stretch.indices if {a, b} & set(program.operations[i].refs)]
        said = f"{named(program, a)} and {named(program, b)} exchanged in {stretch.name}"
        yield Edit(1.3, taken_for(program, a, b), said, dict.fromkeys(users, exchange))


def _like(values: Values, a: int, b: int) -> bool:
    x, y = values.get(a), values.get(b)
    return x is not None and y is not None and x.shape == y.shape and x.dtype == y.dtype


def orders(program: Program, values: Values, near: frozenset[int] = frozenset()) -> Iterator[Edit]:
    """A stretch done earlier or later than in torch."""
    after: dict[int, list[int]] = defaultdict(list)  # operation -> those that follow from it
    makers = program.makers
    for index, operation in enumerate(program.operations):
        for ref in operation.refs:
            if ref in makers:
                after[makers[ref]].append(index)
    before = {i: [makers[r] for r in o.refs if r in makers]
              for i, o in enumerate(program.operations)}  # fmt: skip
    for stretch in stretches(program, near):
        for incoming in stretch.taken:
            leaf = program.leaves.get(incoming)
            if leaf is not None and leaf.kind in ("parameter", "buffer"):
                continue
            if not _like(values, incoming, stretch.given):
                continue
            yield from _moved(program, values, stretch, incoming, after, before, makers)


def _moved(
    program: Program, values: Values, stretch: Stretch, incoming: int,
    after: dict[int, list[int]], before: dict[int, list[int]], makers: dict[int, int],
) -> Iterator[Edit]:  # fmt: skip
    held = set(stretch.indices)

    def leave_out(at: At) -> Any:
        return at.values[incoming]

    for index in _reached(after, stretch.maker)[:_MOVED]:
        if index in held or len(program.operations[index].made) != 1:
            continue
        said = f"{stretch.name} after `{_text(program, index)}`, not before"
        yield Edit(1.4, "order", said,
                   {stretch.maker: leave_out, index: _then(program, stretch, incoming)},
                   at=stretch.maker)  # fmt: skip
    start = makers.get(incoming)
    if start is None:
        return
    earlier = [start, *_reached(before, start)][:_MOVED]
    for index in earlier:
        operation = program.operations[index]
        for ref in dict.fromkeys(operation.refs):
            taken = values.get(ref)
            if taken is None or not taken.is_floating_point():
                continue
            said = f"{stretch.name} before `{_text(program, index)}`, on {named(program, ref)}"
            yield Edit(1.4, "order", said,
                       {index: _first(program, stretch, incoming, ref), stretch.maker: leave_out},
                       at=index)  # fmt: skip


def _then(program: Program, stretch: Stretch, incoming: int) -> Change:
    return lambda at: stretch.on(program, incoming, at.run(), at)


def _first(program: Program, stretch: Stretch, incoming: int, ref: int) -> Change:
    """An operation on what the stretch makes of one of its arguments."""
    return lambda at: with_values(at, {ref: stretch.on(program, incoming, at.values[ref], at)})


def _text(program: Program, index: int) -> str:
    operation = program.operations[index]
    return short(operation.site.text, 40) if operation.site else operation.name


def _reached(edges: dict[int, list[int]], start: int) -> list[int]:
    """What follows from a place, the nearest first; no more than are asked for."""
    found: dict[int, None] = {}
    todo = deque(edges.get(start, ()))
    while todo and len(found) < _MOVED:
        index = todo.popleft()
        if index not in found:
            found[index] = None
            todo += edges.get(index, ())
    return list(found)
