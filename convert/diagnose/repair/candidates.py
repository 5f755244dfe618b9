"""Every edit of a program that is tried."""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from convert.diagnose.repair.edit import Changes, Edit, Node
from convert.diagnose.repair.edits_axes import rearranged
from convert.diagnose.repair.edits_families import families, in_all
from convert.diagnose.repair.edits_loops import Loops, carried
from convert.diagnose.repair.edits_masks import masks as aligned
from convert.diagnose.repair.edits_norms import norms
from convert.diagnose.repair.edits_numbers import numbers, shared
from convert.diagnose.repair.edits_omitted import MASKED, leave_out, solved_after
from convert.diagnose.repair.edits_orders import functions, orders
from convert.diagnose.repair.edits_parts import interleavings
from convert.diagnose.repair.edits_pools import padded
from convert.diagnose.repair.edits_recurrent import recurrent
from convert.diagnose.repair.edits_regrouped import regrouped
from convert.diagnose.repair.edits_resizing import resized
from convert.diagnose.repair.edits_series import series
from convert.diagnose.repair.edits_siblings import COMPARED, siblings
from convert.diagnose.repair.edits_slices import slices
from convert.diagnose.repair.edits_tables import sinusoids, tables
from convert.diagnose.repair.edits_values import exchanges, insertions, leaf_edits, operands
from convert.diagnose.repair.parallel import Parallels
from convert.program.operations import Operation, Program
from convert.program.replay import Values


def every(program: Program, values: Values, near: frozenset[int] = frozenset()) -> Iterator[Edit]:
    """All single edits, of one operation and of groups; with `near` those of these operations."""
    nodes = [n for n in nodes_of(program, values) if not near or n.index in near]
    groups = _Groups(program, values)
    masks, parallels = masking(program, values), Parallels(program)
    for node in nodes:
        for edit in _of(node):
            edit.cause = _of_rotation(node.operation, _of_masks(node, edit.cause, masks))
            yield edit
            yield from groups.of(edit, node)
            if edit.cause in ("operand", "swapped", "residual"):  # these name values
                yield from parallels.of(edit)
    makers = (
        leaf_edits, families, partial(exchanges, near=near), tables, sinusoids,
        partial(functions, near=near), partial(orders, near=near), interleavings, slices, regrouped,
        norms, series, shared, partial(aligned, masking=masks), carried,
    )  # fmt: skip
    loops = Loops(program)
    for maker in makers:
        with contextlib.suppress(Exception):  # as below
            for edit in maker(program, values):
                if not near or edit.place in near:
                    edit.cause = _word_of_mask(edit.cause) if edit.place in masks else edit.cause
                    if edit.place >= 0:
                        edit.cause = _of_rotation(program.operations[edit.place], edit.cause)
                    yield edit
                    yield from parallels.of(edit)
                    yield from in_all(program, edit)
                    if len(edit.changes) > 1 and not edit.leaves and edit.free is None:
                        for changes in loops.several(edit.changes):
                            cost = edit.cost + _TURNS
                            yield replace(edit, changes=changes, cost=cost, at=edit.place)


_TURNS = 0.06  # what an edit of all turns of a loop costs more than one of a single turn


def _all_alike(
    free: Callable[[float], Changes], index: int, indices: list[int]
) -> Callable[[float], Changes]:
    """The same number in several operations."""
    return lambda c: dict.fromkeys(indices, free(c)[index])


def _of_rotation(operation: Operation, cause: str) -> str:
    """Elements in another order, in a function that rotates by its name."""
    site = operation.site
    told = f"{site.function} {site.text}".lower() if site else ""
    rotates = re.search(r"rotat|rotary|rope", told)
    return "rope" if rotates and cause in ("transposed", "rearranged", "concat") else cause


_PLAIN = (
    "left_out", "operation", "operand", "constant", "offset", "order", "reversed", "size", "axis",
    "rearranged", "transposed", "concat", "scale", "residual",
)  # fmt: skip


def _word_of_mask(cause: str) -> str:
    return "mask" if cause in _PLAIN else cause


def _of_masks(node: Node, cause: str, masks: frozenset[int]) -> str:
    """What is done to a value that only says what is masked concerns the mask."""
    if node.index in masks:
        return _word_of_mask(cause)
    return "operation" if cause == "mask" and node.name in COMPARED else cause


def masking(program: Program, values: Values) -> frozenset[int]:
    """Operations whose results only say what is masked."""
    import torch

    makers = program.makers
    kinds = ("layer", "parameter", "input")
    data = {v for v, leaf in program.leaves.items()
            if leaf.kind in kinds and values[v].is_floating_point()}  # fmt: skip
    for operation in program.operations:
        if data & set(operation.sources):
            data |= set(operation.made)
    open_: list[int] = []
    for operation in program.operations:
        for ref in operation.refs:
            x = values.get(ref)
            if x is None or ref in data or ref not in makers:
                continue
            low = x.is_floating_point() and x.numel() > 1 and bool((x <= MASKED).any())
            chosen = x.dtype == torch.bool and operation.name in ("masked_fill", "where")
            if chosen or (low and operation.name in ("add", "sub")):
                open_.append(makers[ref])
    found: set[int] = set()
    while open_:
        index = open_.pop()
        if index not in found:
            found.add(index)
            refs = program.operations[index].refs
            open_ += [makers[r] for r in refs if r in makers and r not in data]
    return frozenset(found)


class _Groups:
    """Operations that are one in the user's code, or alike."""

    def __init__(self, program: Program, values: Values) -> None:
        self._by: dict[Any, list[int]] = defaultdict(list)
        self._keys: dict[int, list[Any]] = {}
        for node in nodes_of(program, values):
            site = node.operation.site
            shapes = tuple(tuple(t.shape) for t in (*node.tensors, node.out))
            keys = [
                ("site", site.position if site else None, node.name),
                ("shapes", node.operation.module, node.name, shapes),
                ("name", node.name),
            ]
            self._keys[node.index] = keys
            for key in keys:
                self._by[key].append(node.index)

    def of(self, edit: Edit, node: Node) -> Iterator[Edit]:
        """The same edit in every run of one expression, in those of one name and shape in one
        module, and in all of one name."""
        done: list[list[int]] = []
        for key, extra in zip(self._keys[node.index], (0.05, 0.1, 0.15), strict=True):
            indices = self._by[key]
            if len(indices) < 2 or indices[0] != node.index or indices in done:
                continue
            done.append(indices)
            if edit.free is None:
                changes = dict.fromkeys(indices, edit.changes[node.index])
                yield replace(edit, changes=changes, cost=edit.cost + extra)
            else:
                free = _all_alike(edit.free, node.index, indices)
                yield replace(edit, cost=edit.cost + extra, at=indices[0], free=free)


def _of(node: Node) -> Iterator[Edit]:
    makers: Iterable[Callable[[Node], Iterator[Edit]]] = (
        leave_out, siblings, numbers, rearranged, recurrent, operands, insertions, solved_after,
        padded, resized,
    )  # fmt: skip
    for maker in makers:
        with contextlib.suppress(Exception):  # one that does not know this form stops no other
            yield from maker(node)


def nodes_of(program: Program, values: Values) -> Iterator[Node]:
    """The operations that were replayed."""
    for index, operation in enumerate(program.operations):
        if operation.made[0] in values:
            yield Node(index, operation, program, values)
