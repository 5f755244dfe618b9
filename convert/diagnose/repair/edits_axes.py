"""The same numbers in another order: axes, views, splits, parts, indices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from convert.diagnose.repair.edit import Edit, Node, dims_of, with_scalar
from convert.program.operations import Program
from convert.program.replay import At, Change, Values, resolve

_PERMUTES = ("permute", "transpose", "swapaxes", "movedim", "T", "mT", "t", "moveaxis")
_VIEWS = ("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as")
_PARTS = ("chunk", "split", "unbind", "tensor_split", "split_with_sizes")


def rearranged(node: Node) -> Iterator[Edit]:
    """What the operation gives, in another order."""
    if node.name in _PERMUTES:
        yield from _permuted(node)
    elif node.name in _VIEWS:
        yield from _viewed(node)
    elif node.name in _PARTS:
        yield from _parts(node)
    elif node.name in ("cat", "stack", "concat"):
        yield from _joined(node)
    elif node.name in ("repeat_interleave", "repeat", "tile"):
        yield from _repeated(node)
    elif node.name == "getitem":
        yield from _indexed(node)
    elif node.name == "matmul":
        yield from _products(node)


def _permuted(node: Node) -> Iterator[Edit]:
    x, out = node.tensors[0], node.out
    n = x.ndim
    if n > 4:
        return
    for order in itertools.permutations(range(n)):
        if [x.shape[i] for i in order] == list(out.shape) and x.permute(
            order
        ).stride() == out.stride():
            continue

        def change(at: At, order: tuple[int, ...] = order) -> Any:
            return at.args[0].permute(order)

        yield node.edit(1.3, "transposed", f"the axes in the order {order}", change)
    shape = tuple(out.shape)
    yield node.edit(1.0, "rearranged", f"a reshape to {shape} in place of {node.name}",
                    lambda at: at.args[0].reshape(shape))  # fmt: skip


def _groups(a: Sequence[int], b: Sequence[int]) -> Iterator[tuple[range, range]]:
    """Runs of axes of two shapes that hold the same elements."""
    i = j = 0
    while i < len(a) or j < len(b):
        k, m = i + 1, j + 1
        p, q = math.prod(a[i:k]), math.prod(b[j:m])
        while p != q and (k < len(a) or m < len(b)):
            if (p < q or m >= len(b)) and k < len(a):
                k += 1
            else:
                m += 1
            p, q = math.prod(a[i:k]), math.prod(b[j:m])
        yield range(i, min(k, len(a))), range(j, min(m, len(b)))
        i, j = k, m


def _viewed(node: Node) -> Iterator[Edit]:
    before, after = tuple(node.tensors[0].shape), tuple(node.out.shape)
    for old, new in _groups(before, after):
        if len(old) == 1 and 1 < len(new) <= 4:
            yield from _split_otherwise(node, after, new)
        elif (1 < len(old) <= 4 and len(new) == 1) or (
            len(old) > 1 and len(new) > 1 and len(old) <= 4
        ):
            yield from _merged_otherwise(node, before, old, after)


def _split_otherwise(node: Node, after: tuple[int, ...], new: range) -> Iterator[Edit]:
    for order in itertools.permutations(range(len(new))):
        if order == tuple(range(len(new))):
            continue
        inner = [after[new[i]] for i in order]
        shape = (*after[: new.start], *inner, *after[new.stop :])
        back = list(range(len(after)))
        for i, o in enumerate(order):
            back[new.start + o] = new.start + i
        if list(shape) == list(after) and back == list(range(len(after))):
            continue

        def change(at: At, shape: Any = shape, back: Any = back) -> Any:
            return at.args[0].reshape(shape).permute(back)

        names = " x ".join(str(n) for n in inner)
        said = f"the axis split as {names}, not as {' x '.join(str(after[i]) for i in new)}"
        yield node.edit(1.0, _heads(node, len(new)), said, change)


def _merged_otherwise(
    node: Node, before: tuple[int, ...], old: range, after: tuple[int, ...]
) -> Iterator[Edit]:
    for order in itertools.permutations(range(len(old))):
        if order == tuple(range(len(old))):
            continue
        axes = list(range(len(before)))
        axes[old.start : old.stop] = [old[i] for i in order]

        def change(at: At, axes: Any = axes) -> Any:
            return at.args[0].permute(axes).reshape(after)

        names = " x ".join(str(before[old[i]]) for i in order)
        said = f"axes joined as {names}, not as {' x '.join(str(before[i]) for i in old)}"
        yield node.edit(1.0, _heads(node, len(old)), said, change)


def _heads(node: Node, parts: int) -> str:
    """Whether it is an attention whose heads are split or joined here."""
    if parts != 2:
        return "rearranged"
    near = node.program.operations
    inside = any(o.name == "softmax" and o.module == node.operation.module for o in near)
    text = node.operation.site.text if node.operation.site else ""
    return "heads" if inside or "head" in text else "rearranged"


def _parts(node: Node) -> Iterator[Edit]:
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
        yield node.edit(1.0, "blocks", said, change)
    if node.name != "unbind" and len({t.shape for t in _made(node)}) == 1:
        d = dims_of(node.operation)
        axis = d[1] if d and isinstance(d[1], int) else 0

        def interleaved(at: At) -> Any:
            x = at.args[0].movedim(axis, -1)
            return tuple(x[..., i::count].movedim(-1, axis) for i in range(count))

        yield node.edit(1.0, "rearranged", f"every {count}th element in place of blocks",
                        interleaved)  # fmt: skip


def _made(node: Node) -> list[Any]:
    return [node.values[v] for v in node.operation.made if v in node.values]


def _joined(node: Node) -> Iterator[Edit]:
    parts = node.args[0] if node.args else ()
    count = len(parts)
    orders = itertools.permutations(range(count)) if count <= 4 else [tuple(range(count))[::-1]]
    for order in orders:
        if tuple(order) == tuple(range(count)):
            continue

        def change(at: At, order: Any = order) -> Any:
            given = [at.args[0][i] for i in order]
            return resolve(at.operation.function)(given, *at.args[1:], **at.kwargs)

        yield node.edit(1.0, "concat", f"its parts in the order {tuple(order)}", change)
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


def _repeated(node: Node) -> Iterator[Edit]:
    x, out = node.tensors[0], node.out
    if x.ndim != out.ndim:
        return
    factors = [b // a for a, b in zip(x.shape, out.shape, strict=True)]

    def blocks(at: At) -> Any:
        return at.args[0].repeat(factors)

    def each(at: At) -> Any:
        made = at.args[0]
        for d, n in enumerate(factors):
            made = made.repeat_interleave(n, d) if n > 1 else made
        return made

    if node.name == "repeat_interleave":
        yield node.edit(1.0, "rearranged", "the whole repeated, not each element", blocks)
    else:
        yield node.edit(1.0, "rearranged", "each element repeated, not the whole", each)


def _products(node: Node) -> Iterator[Edit]:
    def turned(i: int) -> Any:
        def change(at: At) -> Any:
            import torch

            parts = list(at.args[:2])
            parts[i] = parts[i].transpose(-1, -2)
            return torch.matmul(*parts)

        return change

    for i, which in enumerate(("first", "second")):
        if node.tensors[i].ndim > 1:
            yield node.edit(1.0, "transposed", f"the {which} operand transposed", turned(i))
    yield node.edit(1.0, "operand", "the operands exchanged",
                    lambda at: at.args[1] @ at.args[0])  # fmt: skip


def _indexed(node: Node) -> Iterator[Edit]:
    """Other indices: one further, the other end, every second for a half, a mean."""
    if len(node.operation.args) < 2:
        return
    index = node.operation.args[1]
    items = list(index) if isinstance(index, tuple) else [index]
    x = node.tensors[0]
    axis = 0
    for i, item in enumerate(items):
        if item is Ellipsis:
            axis = x.ndim - sum(k is not None for k in items[i + 1 :])
            continue
        if item is None:
            continue
        size = x.shape[axis] if axis < x.ndim else 0
        for said, cause, other in _others(item, size):
            new = (*items[:i], other, *items[i + 1 :])
            said = f"index {_shown(other)} in place of {_shown(item)}" + said
            yield node.edit(1.0, cause, said, with_scalar((1,), new))
        axis += 1
    ints = [i for i, item in enumerate(items) if isinstance(item, int)]
    if len(ints) == 1:
        at_axis = sum(1 for item in items[: ints[0]] if item is not None and item is not Ellipsis)
        for said, f in (("mean", "mean"), ("maximum", "amax"), ("sum", "sum")):

            def change(at: At, f: str = f) -> Any:
                return getattr(at.args[0], f)(at_axis)

            yield node.edit(1.2, "token", f"the {said} over the axis in place of one index", change)


def _others(item: Any, size: int) -> Iterator[tuple[str, str, Any]]:
    if isinstance(item, int) and not isinstance(item, bool):
        for other in dict.fromkeys((0, -1, item + 1, item - 1, 1)):
            if other != item and -size <= other < size and other % size != item % size:
                yield "", "token", other
    elif isinstance(item, slice):
        start, stop, step = item.indices(size)
        for a, b in ((1, 1), (-1, -1), (1, 0), (0, 1), (0, -1), (-1, 0)):
            if start + a >= 0 and stop + b <= size:
                yield "", "offset", slice(start + a, stop + b, step)
        for other in range(min(size, 8)) if start else ():
            if abs(other - start) > 1:
                yield "", "token", slice(other, stop, step)
        half = size // 2
        if step == 1 and (start, stop) == (0, half):
            yield "", "rearranged", slice(0, None, 2)
            yield "", "operand", slice(half, None)
        elif step == 1 and (start, stop) == (half, size):
            yield "", "rearranged", slice(1, None, 2)
            yield "", "operand", slice(0, half)
        elif step == 2:
            yield "", "rearranged", slice(0, half) if start == 0 else slice(half, None)
            yield "", "operand", slice(1 - start, None, 2) if start in (0, 1) else slice(None)
        elif (start, stop) != (0, size):
            yield "", "offset", slice(0, stop - start)
            yield "", "offset", slice(size - (stop - start), None)


def _shown(item: Any) -> str:
    if not isinstance(item, slice):
        return str(item)
    parts = ["" if x is None else str(x) for x in (item.start, item.stop)]
    return ":".join(parts) + ("" if item.step in (None, 1) else f":{item.step}")


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
