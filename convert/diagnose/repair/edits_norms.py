"""A normalisation of another kind: with its mean taken off, or without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from convert.diagnose.repair.edit import Edit, Node, dims_of, with_values
from convert.program.operations import Program
from convert.program.replay import At, Values

_ROOTS = ("rsqrt", "sqrt", "pow")
_SQUARES = ("pow", "square", "mul")


def norms(program: Program, values: Values) -> Iterator[Edit]:
    """Every root mean square taken of centred values, every variance taken about zero."""
    for index, operation in enumerate(program.operations):
        if operation.made[0] not in values:
            continue
        node = Node(index, operation, program, values)
        if operation.name == "mean":
            yield from _centred(node)
            yield from _in_groups(node)
        elif operation.name in ("var", "std"):
            yield from _about_zero(node)


def _centred(node: Node) -> Iterator[Edit]:
    """The mean of the squares of x, under a root: x less its mean, there and where it is scaled."""
    program = node.program
    squared = program.makers.get(node.operation.refs[0])
    dims = dims_of(node.operation)
    if squared is None or dims is None or not _rooted(program, node.operation.made[0]):
        return
    square = program.operations[squared]
    if square.name not in _SQUARES or len(set(square.refs)) != 1:
        return
    x, axes = square.refs[0], dims[1]

    def centred(at: At) -> Any:
        held = at.values[x]
        return with_values(at, {x: held - held.mean(axes, keepdim=True)})

    roots = _after(program, node.operation.made[0])
    users = [i for i in program.users[x] if set(program.operations[i].refs) & roots]
    if users:
        changes = dict.fromkeys((squared, *users), centred)
        said = "the mean taken off first, as LayerNorm does"
        yield Edit(1.0, "norm_kind", said, changes, at=squared)


def _in_groups(node: Node) -> Iterator[Edit]:
    """A mean of squares over equal parts of the last axis, as heads are, in place of all of it."""
    x, dims = node.tensors[0], dims_of(node.operation)
    last = dims is not None and dims[1] in (-1, (-1,), [-1], x.ndim - 1)
    if not last or not x.ndim or node.out.shape != (*x.shape[:-1], 1):
        return
    if not _rooted(node.program, node.operation.made[0]):
        return
    size = x.shape[-1]
    for count in (n for n in range(2, size // 2 + 1) if size % n == 0):

        def change(at: At, count: int = count) -> Any:
            made = at.args[0].unflatten(-1, (count, -1)).mean(-1, keepdim=True)
            return made.expand(*made.shape[:-1], size // count).flatten(-2)

        said = f"a mean over each of {count} parts of the axis"
        yield node.edit(1.1 + 0.01 * count, "axis", said, change)


def _about_zero(node: Node) -> Iterator[Edit]:
    """A variance beside a mean of the same: the mean square, and no mean taken off."""
    program, x, dims = node.program, node.operation.refs[0], dims_of(node.operation)
    means = [i for i in program.users.get(x, ()) if program.operations[i].name == "mean"
             and dims_of(program.operations[i]) == dims]  # fmt: skip
    if dims is None or not means:
        return
    root = node.name == "std"

    def square(at: At) -> Any:
        made = (at.values[x] ** 2).mean(dims[1], keepdim=True).reshape(node.out.shape)
        return made.sqrt() if root else made

    changes = {node.index: square, **dict.fromkeys(means, lambda at: at.run() * 0)}
    said = "the root mean square with no mean taken off, as RMSNorm does"
    yield Edit(1.0, "norm_kind", said, changes, at=node.index)


def _after(program: Program, value: int, steps: int = 4) -> set[int]:
    """What is made of a value in a few steps."""
    found = {value}
    for _ in range(steps):
        found |= {m for v in found for i in program.users.get(v, ())
                  for m in program.operations[i].made}  # fmt: skip
    return found


def _rooted(program: Program, value: int) -> bool:
    near = _after(program, value, 2)
    return any(program.operations[i].name in _ROOTS for v in near for i in program.users.get(v, ()))
