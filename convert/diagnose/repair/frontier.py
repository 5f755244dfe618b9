"""Where in a long program to look first: where torch's values cease to be among Flax's."""

from __future__ import annotations

from convert.diagnose.unseen import SeenValues
from convert.program.operations import Program
from convert.program.replay import Values

LONG = 60  # operations: of fewer, all are tried in time
_AROUND = 2  # operations before and after


def frontier(program: Program, values: Values, seen: SeenValues) -> frozenset[int]:
    """Indices of the first operation that gives what Flax has not computed, though it takes nothing
    but what Flax has, of those around it, and of one run of each expression of its module."""
    makers = {v: i for i, o in enumerate(program.operations) for v in o.made}
    users: dict[int, list[int]] = {}
    for i, operation in enumerate(program.operations):
        for value in operation.refs:
            users.setdefault(value, []).append(i)
    good: set[int] = set(program.leaves)
    for i in reversed(range(len(program.operations))):
        operation = program.operations[i]
        if set(operation.made) & good or any(seen.has(values[v]) for v in operation.made):
            good |= {*operation.made, *operation.refs}
    # What is too small to be told is taken for right.
    small = {v for v, x in values.items() if not seen.tells(x)}
    for i, operation in enumerate(program.operations):
        if set(operation.made) & (good | small) or not set(operation.refs) <= good | small:
            continue
        near = {i}
        for _ in range(_AROUND):
            near |= {makers[v] for k in near for v in program.operations[k].refs if v in makers}
            near |= {u for k in near for v in program.operations[k].made for u in users.get(v, ())}
        first: dict[object, int] = {}
        for k, other in enumerate(program.operations):
            if other.module == operation.module and other.site is not None:
                first.setdefault((other.site.position, other.name), k)
        return frozenset(near | set(first.values()))
    return frozenset()
