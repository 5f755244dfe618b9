"""The same numbers in another order: axes, views, splits, parts, indices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from convert.diagnose.repair.edit import (
    NAMELESS,
    Edit,
    Node,
    dims_of,
    named,
    with_scalar,
    with_values,
)
from convert.diagnose.repair.edits_parts import VIEWS, joined, parts
from convert.diagnose.repair.words import is_fixed, is_image, of_window
from convert.program.operations import Ref
from convert.program.replay import At

_PERMUTES = ("permute", "transpose", "swapaxes", "movedim", "T", "mT", "t", "moveaxis")
_PARTS = ("chunk", "split", "unbind", "tensor_split", "split_with_sizes")


def rearranged(node: Node) -> Iterator[Edit]:
    """What the operation gives, in another order."""
    if node.name in _PERMUTES:
        yield from _permuted(node)
    elif node.name in VIEWS:
        yield from _viewed(node)
    elif node.name in _PARTS:
        yield from parts(node)
    elif node.name in ("cat", "stack", "concat"):
        yield from joined(node)
    elif node.name in ("repeat_interleave", "repeat", "tile"):
        yield from _repeated(node)
    elif node.name == "getitem":
        yield from _indexed(node)
    elif node.name == "matmul":
        yield from _products(node)
    elif node.name == "unsqueeze":
        yield from _unsqueezed(node)
    elif node.name in ("add", "sub", "mul", "masked_fill", "where"):
        yield from _repeated_otherwise(node)


def _permuted(node: Node) -> Iterator[Edit]:
    x, out = node.tensors[0], node.out
    n = x.ndim
    for order in itertools.permutations(range(n)) if n <= 4 else _exchanged(node):
        if [x.shape[i] for i in order] == list(out.shape) and x.permute(
            order
        ).stride() == out.stride():
            continue

        def change(at: At, order: tuple[int, ...] = order) -> Any:
            return at.args[0].permute(order)

        # Of relative positions: of queries to keys, or of keys to queries.
        why = "operand" if is_fixed(node.program, node.operation.refs[0]) else "transposed"
        yield node.edit(1.3, why, f"the axes in the order {order}", change)
    shape = tuple(out.shape)
    yield node.edit(1.0, "rearranged", f"a reshape to {shape} in place of {node.name}",
                    lambda at: at.args[0].reshape(shape))  # fmt: skip


def _exchanged(node: Node) -> Iterator[tuple[int, ...]]:
    """The axes as torch has them, but for two."""
    n = node.out.ndim
    strides, sizes = node.tensors[0].stride(), node.tensors[0].shape
    lying = [next((i for i in range(n) if (strides[i], sizes[i]) == held), None)
             for held in zip(node.out.stride(), node.out.shape, strict=True)]  # fmt: skip
    if len(set(lying)) < n or None in lying:
        return
    for a, b in itertools.combinations(range(n), 2):
        order = [int(i) for i in lying if i is not None]
        order[a], order[b] = order[b], order[a]
        yield tuple(order)


def runs(a: Sequence[int], b: Sequence[int]) -> Iterator[tuple[range, range]]:
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
    yield from _parts_first(node, after)
    for old, new in runs(before, after):
        if len(old) == 1 and 1 < len(new) <= 4:
            yield from split_otherwise(node, after, new)
        elif (1 < len(old) <= 4 and len(new) == 1) or (
            len(old) > 1 and len(new) > 1 and len(old) <= 4
        ):
            yield from merged_otherwise(node, before, old, after)


def _parts_first(node: Node, after: tuple[int, ...]) -> Iterator[Edit]:
    """An axis split into (heads, parts), where all heads of one part come before the next part."""
    x = node.tensors[0]
    if len(after) < 2 or after[:-2] != tuple(x.shape[:-1]):
        return
    heads, width = after[-2:]
    found = set()
    for operation in node.program.operations[node.index + 1 :]:
        made = tuple(node.values[v].shape[-1] for v in operation.made if v in node.values)
        if operation.name in ("split", "split_with_sizes", "chunk") and sum(made) == width:
            found.add(made)
    for sizes in sorted(found):

        def change(at: At, sizes: tuple[int, ...] = sizes) -> Any:
            import torch

            pieces = at.args[0].split([heads * n for n in sizes], -1)
            return torch.cat([p.unflatten(-1, (heads, -1)) for p in pieces], -1)

        said = f"the axis as all heads of one part before the next part, of {sizes}"
        yield node.edit(1.05, "rearranged", said, change)


def split_otherwise(node: Node, after: tuple[int, ...], new: range) -> Iterator[Edit]:
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
        yield node.edit(1.0, heads_or_not(node, len(new)), said, change)


def merged_otherwise(
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
        channels = len(old) > 2 and order == (*range(1, len(old)), 0)
        why = "flatten" if channels else heads_or_not(node, len(old))
        if why == "rearranged" and len(before) > 3 and is_image(node):
            why = "flatten"
        if not node.out.is_floating_point():
            why = "transposed"
        yield node.edit(1.0, why, said, change)


def heads_or_not(node: Node, parts: int) -> str:
    """Whether it is an attention whose heads are split or joined here."""
    if parts != 2:
        return "rearranged"
    near = node.program.operations
    inside = any(o.name == "softmax" and o.module == node.operation.module for o in near)
    text = node.operation.site.text if node.operation.site else ""
    return "heads" if inside or "head" in text else "rearranged"


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


def _repeated_otherwise(node: Node) -> Iterator[Edit]:
    """An operand that is repeated along an axis beside its own: element by element in place of as a
    whole, or the other way round."""
    out = node.out
    for ref in dict.fromkeys(node.operation.refs):
        x = node.values[ref]
        shape = (1,) * (out.ndim - x.ndim) + tuple(x.shape)
        for d in range(out.ndim - 1):
            sizes = shape[d], shape[d + 1]
            full = out.shape[d], out.shape[d + 1]
            if 1 not in sizes or max(sizes) == 1 or min(full) == 1 or set(sizes) == {1}:
                continue
            if (sizes[0] == 1) != (sizes[1] == full[1]):
                continue

            def change(at: At, ref: int = ref, d: int = d, shape: Any = shape) -> Any:
                held = at.values[ref].reshape(shape)
                return with_values(at, {ref: _dealt(held, d, out.shape)})

            said = f"{named(node.program, ref)} repeated in the other order along axes {d} and"
            yield node.edit(1.1, "rearranged", f"{said} {d + 1}", change)


def _dealt(x: Any, d: int, shape: Any) -> Any:
    """x repeated along axes d and d + 1, one of which it has, each element of that one in turn."""
    a, b = shape[d], shape[d + 1]
    flat = x.squeeze(d) if x.shape[d] == 1 else x.squeeze(d + 1)
    each = x.shape[d] == 1  # as a whole so far
    n = a if each else b
    made = flat.repeat_interleave(n, d) if each else flat.repeat(
        *(n if i == d else 1 for i in range(flat.ndim)))  # fmt: skip
    return made.unflatten(d, (a, b))


def _unsqueezed(node: Node) -> Iterator[Edit]:
    found = dims_of(node.operation)
    n = node.out.ndim
    for d in range(n if found else 0):
        assert found is not None
        if d != found[1] % n:
            said = f"the new axis as axis {d}, not {found[1] % n}"
            yield node.edit(1.1, NAMELESS, said, with_scalar(found[0], d))


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
        window = of_window(node)
        for said, cause, other in (*_others(item, size), *_windows(item, size)):
            cause = window if window and cause == "offset" else cause
            new = (*items[:i], other, *items[i + 1 :])
            said = f"index {_shown(other)} in place of {_shown(item)}" + said
            yield node.edit(1.0, cause, said, with_scalar((1,), new))
        axis += 1
    yield from _looked_up(node, items)
    if None in items and len(items) <= 5:
        yield from _new_axes(node, items)
    ints = [i for i, item in enumerate(items) if isinstance(item, int)]
    if len(ints) == 1:
        at_axis = sum(1 for item in items[: ints[0]] if item is not None and item is not Ellipsis)
        for said, f in (("mean", "mean"), ("maximum", "amax"), ("sum", "sum")):

            def change(at: At, f: str = f) -> Any:
                return getattr(at.args[0], f)(at_axis)

            yield node.edit(1.2, "token", f"the {said} over the axis in place of one index", change)


def _new_axes(node: Node, items: list[Any]) -> Iterator[Edit]:
    """New axes in other places: a mask over the queries, not over the keys."""
    plain = [i for i in items if i is not None]
    seen = {tuple(i is None for i in items)}
    for order in itertools.permutations(i is None for i in items):
        if order not in seen:
            seen.add(order)
            rest = iter(plain)
            new = tuple(None if n else next(rest) for n in order)
            shown = [", ".join(map(_shown, index)) for index in (new, items)]
            said = f"index {shown[0]} in place of {shown[1]}"
            yield node.edit(1.1, "axis", said, with_scalar((1,), new))


def _looked_up(node: Node, items: list[Any]) -> Iterator[Edit]:
    """Another index where computed ones stand: the first, the last, one further."""
    import torch

    x = node.tensors[0]
    for i, item in enumerate(items):
        held = node.values[item.value] if isinstance(item, Ref) else None
        if held is None or held.dtype not in (torch.int64, torch.int32) or i >= x.ndim:
            continue
        size, place = x.shape[i], node.operation.refs.index(item.value)
        for said, made in (
            ("the first", torch.zeros_like), ("the last", lambda t, n=size: t * 0 + n - 1),
            ("the one before", lambda t, n=size: (t - 1) % n),
            ("the one after", lambda t, n=size: (t + 1) % n),
        ):  # fmt: skip

            def change(at: At, k: int = place, made: Any = made) -> Any:
                ref = at.operation.refs[k]
                return with_values(at, {ref: made(at.values[ref])})

            # Where no index counts the rows, they are single numbers, not steps.
            others = [k.value for k in items if isinstance(k, Ref)]
            steps = len(others) < x.ndim or any(v in node.program.tables for v in others)
            said = f"{said} in place of the one that is looked up"
            yield node.edit(1.1, "token" if steps else "operand", said, change)


def _others(item: Any, size: int) -> Iterator[tuple[str, str, Any]]:
    if isinstance(item, int) and not isinstance(item, bool):
        for other in dict.fromkeys((0, -1, item + 1, item - 1, 1)):
            if other != item and -size <= other < size and other % size != item % size:
                yield "", "token", other
    elif isinstance(item, slice):
        start, stop, step = item.indices(size)
        for a, b in ((1, 1), (-1, -1), (1, 0), (0, 1), (0, -1), (-1, 0)):
            several = stop + b - start - a > 1 or stop - start == 1  # one is repeated for many
            if start + a >= 0 and stop + b <= size and several:
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


def _windows(item: Any, size: int) -> Iterator[tuple[str, str, Any]]:
    """As many elements from every other place."""
    if isinstance(item, slice):
        start, stop, step = item.indices(size)
        for other in range(min(size - (stop - start) + 1, 16)):
            if abs(other - start) > 1 and step == 1:
                yield "", "offset", slice(other, other + stop - start)


def _shown(item: Any) -> str:
    if not isinstance(item, slice):
        return str(item)
    parts = ["" if x is None else str(x) for x in (item.start, item.stop)]
    return ":".join(parts) + ("" if item.step in (None, 1) else f":{item.step}")
