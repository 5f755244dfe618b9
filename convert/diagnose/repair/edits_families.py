"""Parameters that have one name but for a number: experts, heads, layers of a stack.

Where the other side holds them as one tensor, what is wrong with one is wrong with all.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from convert.diagnose.repair.edit import Edit, first_users
from convert.program.operations import Program
from convert.program.replay import Values

Family = dict[tuple[str, ...], int]  # the numbers in a name -> value


def families(program: Program, values: Values) -> Iterator[Edit]:
    """All of a family in another form, in another order, or in the place of another family."""
    users = first_users(program)
    found: dict[str, Family] = {}
    for value, leaf in program.leaves.items():
        if leaf.kind in ("parameter", "buffer") and value in users:
            pattern = re.sub(r"\d+", "*", leaf.name)
            found.setdefault(pattern, {})[tuple(re.findall(r"\d+", leaf.name))] = value
    for name, family in found.items():
        if len(family) > 1 and len({values[v].shape for v in family.values()}) == 1:
            yield from _alone(name, family, values, min(users[v] for v in family.values()))
    yield from _exchanged(program, values, users)


def in_all(program: Program, edit: Edit) -> Iterator[Edit]:
    """The edit of one parameter in all of its family: layers of a stack that one code loads."""
    if len(edit.leaves) != 1 or edit.changes or edit.free is not None:
        return
    ((value, form),) = edit.leaves.items()
    leaf, users = program.leaves[value], program.users
    pattern = re.sub(r"\d+", "*", leaf.name)
    alike = [v for v, other in program.leaves.items()
             if v in users and re.sub(r"\d+", "*", other.name) == pattern]  # fmt: skip
    if len(alike) > 1 and alike[0] == value and leaf.kind in ("parameter", "buffer"):
        yield replace(edit, leaves=dict.fromkeys(alike, form), cost=edit.cost + 0.08)


def _exchanged(program: Program, values: Values, users: dict[int, int]) -> Iterator[Edit]:
    """All parameters of layers of one name and those of other such layers, in each other's place:
    query and key, the two projections of every expert."""
    layers: dict[str, Family] = {}  # pattern of the layers' names -> (numbers, leaf) -> value
    for value, leaf in program.leaves.items():
        if leaf.kind in ("parameter", "buffer") and value in users:
            layer, _, last = leaf.name.rpartition(".")
            numbers = (*re.findall(r"\d+", layer), last)
            layers.setdefault(re.sub(r"\d+", "*", layer), {})[numbers] = value
    for layer, family in layers.items():
        for one, other in itertools.combinations(sorted({k[-1] for k in family}), 2):
            pairs = [(family.get((*k[:-1], one)), family.get((*k[:-1], other))) for k in family]
            named = f"{layer}.{one}", f"{layer}.{other}"
            yield from _swapped(*named, [p for p in pairs if None not in p], values, users)
    for (one, a), (other, b) in itertools.combinations(layers.items(), 2):
        if a.keys() != b.keys() or one.rpartition(".")[0] != other.rpartition(".")[0]:
            continue
        yield from _swapped(one, other, [(a[k], b[k]) for k in a], values, users)


def _swapped(
    one: str, other: str, pairs: list[Any], values: Values, users: dict[int, int]
) -> Iterator[Edit]:
    if not pairs or any(values[a].shape != values[b].shape for a, b in pairs):
        return
    leaves = {a: _always(values[b]) for a, b in pairs} | {b: _always(values[a]) for a, b in pairs}
    at = min(users[v] for v in leaves)
    yield Edit(1.0, "swapped", f"{one} and {other} exchanged", leaves=leaves, at=at)


def _alone(name: str, family: Family, values: Values, at: int) -> Iterator[Edit]:
    held = [family[k] for k in sorted(family, key=lambda k: [int(n) for n in k])]
    shape = values[held[0]].shape
    names = sorted(range(len(held)), key=str)
    orders = {
        "in the order of their names, 10 before 2": [held[i] for i in names],
        "in the other order": held[::-1],
        "one further": held[1:] + held[:1],
        "one back": held[-1:] + held[:-1],
        "all as the first one": held[:1] * len(held),
    }
    for said, order in orders.items():
        if order != held:
            leaves = {v: _always(values[w]) for v, w in zip(held, order, strict=True)}
            yield Edit(1.2, "swapped", f"{name} {said}", leaves=leaves, at=at)
    for d in range(len(shape) - 1):
        if shape[d] == shape[d + 1] > 1:
            yield Edit(1.1, "transposed", f"{name} transposed",
                       leaves=dict.fromkeys(held, _turned(d)), at=at)  # fmt: skip


def _always(x: Any) -> Callable[[Any], Any]:
    return lambda _: x


def _turned(d: int) -> Callable[[Any], Any]:
    return lambda x: x.transpose(d, d + 1)
