"""Which regions of its inputs a region of an op's output needs, and how it is made of them.

What is needed is a box of each input, at times with more in it than the region: then the op runs on
the box, and the rest is cut off. So tensors larger than the memory go through ops in slabs, and a
device reads no more of a checkpoint than its share.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from zoo.containers.regions import Region, extent
from zoo.layout.ops import (
    Concat,
    Divide,
    Each,
    Flip,
    Merge,
    Op,
    Ops,
    Permute,
    Reorder,
    Shape,
    Split,
    Stack,
    Unstack,
    run_shapes,
)

Need = tuple[int, Region]  # which input, and the region of it
Read = Callable[[int, Region], np.ndarray]


def needed(ops: Ops, shapes: Sequence[Shape], which: int, region: Region) -> list[Need]:
    """What a region of output number `which` needs of inputs of these shapes."""
    if not ops:
        return [(which, region)]
    front, last = ops[:-1], ops[-1]
    needs = _needs(last, run_shapes(front, shapes), which, region)
    return [need for i, part in needs for need in needed(front, shapes, i, part)]


def assemble(
    ops: Ops, shapes: Sequence[Shape], which: int, region: Region, read: Read
) -> np.ndarray:
    """A region of output number `which`, a view where possible; `read` gives the regions that
    `needed` names, in that order."""
    if not ops:
        return read(which, region)
    front, last = ops[:-1], ops[-1]
    between = run_shapes(front, shapes)
    needs = _needs(last, between, which, region)
    parts = [assemble(front, shapes, i, part, read) for i, part in needs]
    return _piece(last, between, which, region, parts)


def _needs(op: Op, shapes: Sequence[Shape], which: int, region: Region) -> list[Need]:
    match op:
        case Permute(axes):
            return [(which, tuple(region[axes.index(a)] for a in range(len(axes))))]
        case Flip(axes):
            shape = shapes[which]
            pairs = enumerate(zip(region, shape, strict=True))
            turned = (_turned(s, n, a in axes) for a, (s, n) in pairs)
            return [(which, tuple(turned))]
        case Reorder():
            return [(which, _replaced(region, op.axis, 1, (_blocks(op, region[op.axis])[0],)))]
        case Split(axis, _, sizes):
            _, start, stop = _flat(sizes, region[axis : axis + len(sizes)])
            return [(which, _replaced(region, axis, len(sizes), (slice(start, stop),)))]
        case Merge(axis, _, sizes):
            box, _ = _box(sizes, region[axis])
            return [(which, _replaced(region, axis, 1, box))]
        case Concat(axis, sizes):
            return [
                (i, _replaced(region, axis, 1, (slice(start, stop),)))
                for i, start, stop in _overlaps(sizes, region[axis])
            ]
        case Divide(axis, sizes):
            first = sum(sizes[:which])
            moved = slice(region[axis].start + first, region[axis].stop + first)
            return [(0, _replaced(region, axis, 1, (moved,)))]
        case Stack(axis, groups):
            rest, stop = _replaced(region, axis, 1, ()), region[axis].stop
            first = min(region[axis].start, max(stop - 1, 0))  # one at least, for the dtype
            return [(which + i * groups, rest) for i in range(first, max(stop, 1))]
        case Unstack(axis, groups):
            i = which // groups
            return [(which % groups, _replaced(region, axis, 0, (slice(i, i + 1),)))]
        case Each():
            first, some, ops, among = _stretch(op, shapes, which)
            return [(first + i, part) for i, part in needed(ops, some, among, region)]
    raise TypeError(f"{op} has no regions")


def _piece(
    op: Op, shapes: Sequence[Shape], which: int, region: Region, parts: list[np.ndarray]
) -> np.ndarray:
    """The region, of the parts that `_needs` names."""
    match op:
        case Permute() | Flip():
            return op.run(parts)[0]
        case Reorder(axis):
            held, kept, inner = _blocks(op, region[axis])
            local = Reorder(axis, ((held.stop - held.start) // math.prod(inner), *inner), kept)
            crop = slice(region[axis].start - held.start, region[axis].stop - held.start)
            return _along(local.run(parts)[0], axis, (crop,))
        case Split(axis, names, sizes):
            box, *_ = _flat(sizes, region[axis : axis + len(sizes)])
            whole = Split(axis, names, extent(box)).run(parts)[0]
            cuts = zip(region[axis : axis + len(sizes)], box, strict=True)
            return _along(whole, axis, [_within(s, b) for s, b in cuts])
        case Merge(axis, names, sizes):
            box, start = _box(sizes, region[axis])
            crop = slice(region[axis].start - start, region[axis].stop - start)
            return _along(Merge(axis, names, extent(box)).run(parts)[0], axis, (crop,))
        case Concat(axis):
            return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)
        case Divide():
            return parts[0]
        case Stack(axis):
            count = region[axis].stop - region[axis].start
            return _along(np.stack(parts, axis), axis, (slice(0, count),))
        case Unstack(axis):
            return parts[0].squeeze(axis)
        case Each():
            _, some, ops, among = _stretch(op, shapes, which)
            rest = iter(parts)
            return assemble(ops, some, among, region, lambda i, part: next(rest))
    raise TypeError(f"{op} has no regions")


def _replaced(region: Region, axis: int, count: int, by: Sequence[slice]) -> Region:
    return (*region[:axis], *by, *region[axis + count :])


def _along(array: np.ndarray, axis: int, cuts: Sequence[slice]) -> np.ndarray:
    part: np.ndarray = array[(*(slice(None),) * axis, *cuts)]
    return part


def _within(part: slice, box: slice) -> slice:
    return slice(part.start - box.start, part.stop - box.start)


def _turned(part: slice, n: int, flipped: bool) -> slice:
    return slice(n - part.stop, n - part.start) if flipped else part


def _blocks(op: Reorder, part: slice) -> tuple[slice, tuple[int, ...], tuple[int, ...]]:
    """What of the axis has to be held for a part of it: whole blocks of the factors that are put in
    another order. And the order and the sizes of these, of one block."""
    same = next((i for i, o in enumerate(op.order) if i != o), len(op.order))
    inner = op.sizes[same:]
    n = math.prod(inner)
    held = slice(part.start // n * n, -(-part.stop // n) * n)
    return held, (0, *(o - same + 1 for o in op.order[same:])), inner


def _flat(sizes: Sequence[int], part: Sequence[slice]) -> tuple[Region, int, int]:
    """The box around a part of several axes that lies contiguously once they are one, and where it
    starts and stops there."""
    first = next((i for i, s in enumerate(part) if s.stop - s.start != 1), len(part) - 1)
    box = (*part[: first + 1], *(slice(0, n) for n in sizes[first + 1 :]))
    start = sum(s.start * math.prod(sizes[i + 1 :]) for i, s in enumerate(part[: first + 1]))
    return box, start, start + math.prod(extent(box))


def _box(sizes: Sequence[int], part: slice) -> tuple[Region, int]:
    """The box of several axes around a part of the one that they become, and where it starts."""
    if part.start == part.stop:
        return tuple(slice(0, 0) for _ in sizes), part.start
    first, last = (np.unravel_index(i, sizes) for i in (part.start, part.stop - 1))
    box: list[slice] = []
    start = 0
    for axis, (a, b) in enumerate(zip(first, last, strict=True)):
        start += int(a) * math.prod(sizes[axis + 1 :])
        box.append(slice(int(a), int(b) + 1))
        if a != b:
            break
    return (*box, *(slice(0, n) for n in sizes[len(box) :])), start


def _overlaps(sizes: Sequence[int], part: slice) -> list[tuple[int, int, int]]:
    """Which of several lengths, joined, a part touches, and where in each; one, if it is empty."""
    ends = list(itertools.accumulate(sizes))
    found = [
        (i, max(part.start - (end - n), 0), min(part.stop - (end - n), n))
        for i, (n, end) in enumerate(zip(sizes, ends, strict=True))
    ]
    return [(i, a, b) for i, a, b in found if a < b] or [(0, 0, 0)]


def _stretch(op: Each, shapes: Sequence[Shape], which: int) -> tuple[int, list[Shape], Ops, int]:
    """The stretch that gives output `which`: its first input, their shapes, the ops, and which of
    its outputs it is."""
    first = 0
    for n, ops in op.parts:
        some = list(shapes[first : first + n])
        made = len(run_shapes(ops, some))
        if which < made:
            return first, some, ops, which
        first, which = first + n, which - made
    raise IndexError(which)
