"""Parts of an axis: taken or joined in another order, from other places, in turn."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from convert.diagnose.repair.edit import Edit, Node, dims_of, with_scalar
from convert.program.operations import Program
from convert.program.replay import At, Change, Values, resolve

VIEWS = ("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as")


def parts(node: Node) -> Iterator[Edit]:
    """What the operation gives, in another order, or from other places."""
    count = len(node.operation.made)
    if count < 2:
        return
    orders = itertools.permutations(range(count)) if count <= 4 else [tuple(range(count))[::-1]]
    for order in orders:
        if tuple(order) == tuple(range(count)):
            continue

        def change(at: At, order: Any = order) -> Any:
            made = at.run()
            return tuple(made[i] for i in order)

        said = f"its parts in the order {tuple(order)}"
        yield node.edit(1.0, "swapped", said, change)
    if node.name != "unbind":
        yield from _otherwise_apart(node)


def _otherwise_apart(node: Node) -> Iterator[Edit]:
    """The parts from other places of the axis: the sizes in another order, heads around the parts
    or inside them."""
    found = dims_of(node.operation)
    axis = found[1] if found and isinstance(found[1], int) else 0
    axis %= node.tensors[0].ndim
    sizes = [t.shape[axis] for t in _made(node)]
    count = len(sizes)
    if len(set(sizes)) > 1 and count <= 4:
        for order in itertools.permutations(range(count)):
            if order != tuple(range(count)):
                said = f"the parts lying in the order {order}"
                yield node.edit(1.0, "blocks", said, _lying(axis, sizes, order))
    if axis == node.tensors[0].ndim - 1 and axis > 1:
        said = "the axis before divided too: all of one part, then all of the next"
        yield node.edit(1.05, "rearranged", said, _over_two_axes(sizes))
    if len(set(sizes)) == 1:
        said = f"every {count}th element in place of blocks"
        yield node.edit(1.0, "rearranged", said, _dealt_out(axis, count, 1))
        for width in _widths(node, sizes[0]):
            said = f"the parts of every {width} elements by themselves, as within each head"
            yield node.edit(1.0, "rearranged", said, _dealt_out(axis, count, width))


def _lying(axis: int, sizes: list[int], order: tuple[int, ...]) -> Change:
    def change(at: At) -> Any:
        lying = at.args[0].split([sizes[i] for i in order], axis)
        return tuple(lying[order.index(i)] for i in range(len(sizes)))

    return change


def _over_two_axes(sizes: list[int]) -> Change:
    def change(at: At) -> Any:
        x = at.args[0]
        rows = x.shape[-2]
        parts = x.flatten(-2).split([rows * n for n in sizes], -1)
        return tuple(p.unflatten(-1, (rows, -1)) for p in parts)

    return change


def _dealt_out(axis: int, count: int, width: int) -> Change:
    """Parts that take turns, each time with so many elements."""

    def change(at: At) -> Any:
        x = at.args[0].movedim(axis, -1)
        parts = x.unflatten(-1, (-1, count, width)).unbind(-2)
        return tuple(p.flatten(-2).movedim(-1, axis) for p in parts)

    return change


def _widths(node: Node, size: int) -> list[int]:
    """Sizes into which the parts' axis is divided later: those of a head."""
    made = set(node.operation.made)
    shapes = [node.values[o.made[0]].shape for o in node.program.operations
              if made & set(o.refs) and o.name in VIEWS and o.made[0] in node.values]  # fmt: skip
    return sorted({n for shape in shapes for n in shape if 1 < n < size and size % n == 0})


def _made(node: Node) -> list[Any]:
    return [node.values[v] for v in node.operation.made if v in node.values]


def joined(node: Node) -> Iterator[Edit]:
    """Its parts in another order, or interleaved."""
    parts = node.args[0] if node.args else ()
    count = len(parts)
    orders = itertools.permutations(range(count)) if count <= 4 else [tuple(range(count))[::-1]]
    for order in orders:
        if tuple(order) == tuple(range(count)):
            continue

        def change(at: At, order: Any = order) -> Any:
            given = [at.args[0][i] for i in order]
            return resolve(at.operation.function)(given, *at.args[1:], **at.kwargs)

        # A constant that stands before the others shifts them.
        fixed = [r in node.program.tables for r in node.operation.refs]
        why = "offset" if node.name != "stack" and sorted(fixed) == [False, True] else "concat"
        yield node.edit(1.0, why, f"its parts in the order {tuple(order)}", change)
    if count > 1 and len({tuple(p.shape) for p in parts}) == 1:
        d = dims_of(node.operation)
        axis = d[1] if d and isinstance(d[1], int) else 0

        def interleaved(at: At) -> Any:
            import torch

            if at.operation.name == "stack":
                return torch.cat(list(at.args[0]), axis - 1 if axis < 0 else axis).reshape(
                    node.out.shape
                )
            made = torch.stack([p.movedim(axis, -1) for p in at.args[0]], -1).flatten(-2)
            return made.movedim(-1, axis)

        said = "its parts interleaved" if node.name != "stack" else "its parts one after another"
        yield node.edit(1.0, "rearranged", said, interleaved)


def interleavings(program: Program, values: Values) -> Iterator[Edit]:
    """Rotary positions in the other style: every half taken as every second element, or the other
    way round, where values are taken apart and joined; the tables alike, or left as they are."""
    nodes = [Node(i, o, program, values) for i, o in enumerate(program.operations)
             if o.made[0] in values]  # fmt: skip
    halves: dict[int, Change] = {}
    tables: dict[int, Change] = {}
    for node in nodes:
        if node.name == "getitem" and (change := _half_otherwise(node)) is not None:
            halves[node.index] = change
        elif node.name == "chunk" and len(node.operation.made) == 2:
            halves[node.index] = _every_second
        elif node.name in ("cat", "stack") and len(node.operation.refs) == 2:
            a, b = node.tensors
            if a.shape == b.shape:
                twice = len(set(node.operation.refs)) == 1
                (tables if twice else halves)[node.index] = _joined_otherwise
    if not halves:
        return
    said = "rotary positions in the other style (halves for neighbouring pairs, or back)"
    at = min(halves)
    yield Edit(1.0, "rope", said, {**halves, **tables}, at=at)
    yield Edit(1.1, "rope", f"{said}, the tables as they are", halves, at=at)
    flat = {v: _interleaved for v, leaf in program.leaves.items()
            if leaf.kind in ("buffer", "input", "layer", "constant") and values[v].ndim > 1
            and values[v].is_floating_point() and _is_twice(values[v])}  # fmt: skip
    if flat:
        yield Edit(1.0, "rope", said, halves, leaves=flat, at=at)


def _half_otherwise(node: Node) -> Change | None:
    """A half of the last axis as every second element, or the other way round."""
    index = node.operation.args[1]
    last = index[-1] if isinstance(index, tuple) else index
    if not isinstance(last, slice) or not isinstance(index, tuple):
        return None
    size = node.tensors[0].shape[-1]
    forms = [slice(0, size // 2), slice(size // 2, size), slice(0, size, 2), slice(1, size, 2)]
    held = [s.indices(size) for s in forms]
    if last.indices(size) not in held:
        return None
    other = forms[(held.index(last.indices(size)) + 2) % 4]
    return with_scalar((1,), (*index[:-1], other))


def _every_second(at: At) -> Any:
    return at.args[0][..., 0::2], at.args[0][..., 1::2]


def _joined_otherwise(at: At) -> Any:
    import torch

    a, b = at.args[0]
    if at.operation.name == "stack":
        return torch.cat((a, b), -1).reshape(*a.shape, 2)
    return torch.stack((a, b), -1).flatten(-2)


def _is_twice(x: Any) -> bool:
    n = x.shape[-1]
    return n % 2 == 0 and n > 2 and bool((x[..., : n // 2] == x[..., n // 2 :]).all())


def _interleaved(x: Any) -> Any:
    return x[..., : x.shape[-1] // 2].repeat_interleave(2, -1)
