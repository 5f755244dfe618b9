"""Every edit of a program that is tried."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from convert.diagnose.repair.edit import Changes, Edit, Node
from convert.diagnose.repair.edits_axes import rearranged
from convert.diagnose.repair.edits_families import families
from convert.diagnose.repair.edits_numbers import numbers
from convert.diagnose.repair.edits_orders import functions, orders
from convert.diagnose.repair.edits_parts import interleavings, slices
from convert.diagnose.repair.edits_recurrent import recurrent
from convert.diagnose.repair.edits_siblings import leave_out, siblings, solved_after
from convert.diagnose.repair.edits_tables import sinusoids, tables
from convert.diagnose.repair.edits_values import insertions, leaf_edits, operands
from convert.program.operations import Program
from convert.program.replay import Values


def every(program: Program, values: Values) -> Iterator[Edit]:
    """All single edits, of one operation and of groups."""
    nodes = list(nodes_of(program, values))
    sites: dict[Any, list[int]] = defaultdict(list)
    names: dict[str, list[int]] = defaultdict(list)
    for node in nodes:
        site = node.operation.site
        sites[(site.position if site else None, node.name)].append(node.index)
        names[node.name].append(node.index)
    for node in nodes:
        site = node.operation.site
        same = sites[(site.position if site else None, node.name)]
        for edit in _of(node):
            edit.cause = _of_masks(node, edit.cause)
            yield edit
            yield from _grouped(edit, node, same, names[node.name])
    makers = (
        leaf_edits, families, tables, sinusoids, functions, orders, interleavings, slices,
    )  # fmt: skip
    for maker in makers:
        with contextlib.suppress(Exception):  # as below
            yield from maker(program, values)


def _all_alike(
    free: Callable[[float], Changes], index: int, indices: list[int]
) -> Callable[[float], Changes]:
    """The same number in several operations."""
    return lambda c: dict.fromkeys(indices, free(c)[index])


def _of_masks(node: Node, cause: str) -> str:
    """What is done to truth values concerns a mask."""
    import torch

    if node.out is None or node.out.dtype != torch.bool:
        return cause
    plain = ("left_out", "operation", "operand", "constant", "offset", "order", "reversed", "size")
    return "mask" if cause in plain else cause


def _grouped(edit: Edit, node: Node, same: list[int], alike: list[int]) -> Iterator[Edit]:
    """The same edit in every run of one expression, and in all operations of one name."""
    for indices, extra in ((same, 0.05), (alike, 0.15)):
        if len(indices) < 2 or indices[0] != node.index or (indices is alike and alike == same):
            continue
        if edit.free is None:
            change = edit.changes[node.index]
            grouped = replace(edit, changes=dict.fromkeys(indices, change), cost=edit.cost + extra)
        else:
            free = _all_alike(edit.free, node.index, indices)
            grouped = replace(edit, cost=edit.cost + extra, at=indices[0], free=free)
        yield grouped


def _of(node: Node) -> Iterator[Edit]:
    makers: Iterable[Callable[[Node], Iterator[Edit]]] = (
        leave_out, siblings, numbers, rearranged, recurrent, operands, insertions, solved_after,
    )  # fmt: skip
    for maker in makers:
        with contextlib.suppress(Exception):  # one that does not know this form stops no other
            yield from maker(node)


def nodes_of(program: Program, values: Values) -> Iterator[Node]:
    """The operations that were replayed."""
    for index, operation in enumerate(program.operations):
        if operation.made[0] in values:
            yield Node(index, operation, program, values)
