"""Where in a long program to look first: where torch's values cease to be among Flax's."""

from __future__ import annotations

from convert.diagnose.repair.search import Near
from convert.diagnose.unseen import SeenValues, is_telling
from convert.program.operations import Operation, Program
from convert.program.replay import Values
from convert.runtime.arrays import to_numpy

LONG = 60  # operations: of fewer, all are tried in time
_AROUND = 2  # operations before and after


def frontier(program: Program, values: Values, seen: SeenValues, layer: str = "") -> Near | None:
    """The first operation that gives what Flax has not computed, though it takes nothing but what
    Flax has, with those around it, and one run of each expression of its module. `layer` is that
    module where it is known. None where there is no such operation."""
    operations = program.operations
    good = _good(program, values, seen)
    inside = [i for i, o in enumerate(operations) if not layer or o.module == layer]
    wrong = (i for i in inside if not set(operations[i].made) & good
             and (layer or set(operations[i].refs) <= good))  # fmt: skip
    first = next(wrong, inside[0] if layer and inside else None)
    if first is None:
        return None
    last = first
    while last + 1 < len(operations) and _within(operations[last + 1].module, operations[first]):
        last += 1
    return Near(_around(program, first), last, seen)


def first_lacking(program: Program, values: Values, seen: SeenValues) -> Operation | None:
    """The first operation that gives what Flax has not computed, of what Flax has."""
    good = _good(program, values, seen)
    lacking = (o for o in program.operations if not set(o.made) & good and set(o.refs) <= good)
    return next(lacking, None)


def _good(program: Program, values: Values, seen: SeenValues) -> set[int]:
    """Values that Flax has, or that lead to one that it has. What is too small to be told is taken
    for right; what leads to it by its parts alone is right if all of them are."""
    good: set[int] = set(program.leaves)
    operations, users = program.operations, program.users

    def in_parts(value: int) -> bool:
        takers = [
            operations[u] for u in users.get(value, ()) if _takes_a_part(operations[u], values)
        ]
        return bool(takers) and all(set(o.made) & good for o in takers)

    for operation in reversed(operations):
        made = operation.made
        if set(made) & good or any(in_parts(v) or seen.has(values[v]) for v in made):
            good |= set(made)
            if not _takes_a_part(operation, values):
                good |= set(operation.refs)
    return good | {v for v, x in values.items() if not is_telling(to_numpy(x))}


def _takes_a_part(operation: Operation, values: Values) -> bool:
    """Whether what it gives says nothing of the rest of what it takes."""
    if operation.name not in _PARTS or not operation.refs or not operation.made:
        return False
    return bool(values[operation.made[0]].numel() < values[operation.refs[0]].numel())


_PARTS = ("getitem", "select", "narrow", "chunk", "split", "unbind", "index_select", "tensor_split")


def _within(module: str, operation: Operation) -> bool:
    return module == operation.module or module.startswith(f"{operation.module}.")


def _around(program: Program, index: int) -> frozenset[int]:
    operations = program.operations
    makers, users = program.makers, program.users
    near = {index}
    for _ in range(_AROUND):
        near |= {makers[v] for k in near for v in operations[k].refs if v in makers}
        near |= {u for k in near for v in operations[k].made for u in users.get(v, ())}
    runs: dict[object, int] = {}
    for k, other in enumerate(operations):
        if other.module == operations[index].module and other.site is not None:
            runs.setdefault((other.site.position, other.name), k)
    return frozenset(near | set(runs.values()))
