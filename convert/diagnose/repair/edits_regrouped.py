"""An axis that is split into two in the other order, and joined so again: groups inside of features
for features inside of groups."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from convert.diagnose.repair.edit import Edit, Node
from convert.diagnose.repair.edits_axes import heads_or_not, runs
from convert.diagnose.repair.edits_parts import VIEWS
from convert.program.operations import Program
from convert.program.replay import At, Change, Values


def regrouped(program: Program, values: Values) -> Iterator[Edit]:
    """Of every such pair of views. What is computed instead follows from the shapes at hand, so
    that it fits layers of other sizes too."""
    views = [Node(i, o, program, values) for i, o in enumerate(program.operations)
             if o.name in VIEWS and o.made[0] in values and o.refs[0] in values]  # fmt: skip
    for split, join in itertools.combinations(views, 2):
        if split.operation.made[0] not in program.before.get(join.operation.made[0], ()):
            continue
        after, before = tuple(split.out.shape), tuple(join.tensors[0].shape)
        for (_, new), (old, _) in itertools.product(_folds(split), _folds(join)):
            if len(new) != 2 or len(old) != 2:
                continue
            sizes = after[new.start : new.stop]
            if sizes == before[old.start : old.stop]:
                first, second = sizes
                said = f"the axis split as {second} x {first}, not as {first} x {second}"
                changes = {split.index: _split(new.start), join.index: _joined(old.start)}
                yield Edit(1.05, heads_or_not(split, 2), f"{said}, and joined so", changes)


def _split(axis: int) -> Change:
    def change(at: At) -> Any:
        shape = [*at.run().shape]
        shape[axis], shape[axis + 1] = shape[axis + 1], shape[axis]
        return at.args[0].reshape(shape).transpose(axis, axis + 1)

    return change


def _joined(axis: int) -> Change:
    def change(at: At) -> Any:
        return at.args[0].transpose(axis, axis + 1).reshape(at.run().shape)

    return change


def _folds(node: Node) -> list[tuple[range, range]]:
    """Runs of axes of a view that hold the same elements, where one is several."""
    found = runs(tuple(node.tensors[0].shape), tuple(node.out.shape))
    return [(a, b) for a, b in found if len(a) != len(b)]
