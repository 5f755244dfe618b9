"""Regions: boxes of a tensor, a slice for each axis with its start and stop."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

Region = tuple[slice, ...]


def whole(shape: Sequence[int]) -> Region:
    """All of a tensor."""
    return tuple(slice(0, n) for n in shape)


def extent(region: Region) -> tuple[int, ...]:
    """The shape of what a region holds."""
    return tuple(s.stop - s.start for s in region)


def size(region: Region) -> int:
    """Elements of a region."""
    return math.prod(s.stop - s.start for s in region)


def runs(shape: Sequence[int], region: Region) -> tuple[int, Iterable[int]]:
    """The elements of each contiguous stretch of a region, and where the stretches begin, in
    order: what has to be read, one after the other, for the region of a row-major tensor."""
    steps = [math.prod(shape[a + 1 :]) for a in range(len(shape))]
    cut = [a for a, s in enumerate(region) if s.stop - s.start < shape[a]]
    axis = cut[-1] if cut else 0
    if not size(region):
        return 0, ()
    if not shape:
        return 1, (0,)
    length = (region[axis].stop - region[axis].start) * steps[axis]
    first = region[axis].start * steps[axis]
    outer = [range(s.start * n, s.stop * n, n) for s, n in zip(region[:axis], steps, strict=False)]
    several = [r for r in outer if len(r) > 1]
    first += sum(r.start for r in outer if len(r) == 1)
    if len(several) == 1:  # of a matrix: a range is the fastest
        (r,) = several
        return length, range(first + r.start, first + r.stop, r.step)
    return length, (first + sum(at) for at in itertools.product(*several))


def blocks(shape: Sequence[int], largest: int) -> tuple[int, ...]:
    """The shape of the largest boxes of at most `largest` elements (one, if need be) that lie
    contiguously in a row-major tensor; the last of an axis may be shorter."""
    block = list(shape)
    for axis, n in enumerate(shape):
        block[axis] = min(n, max(1, largest // max(1, math.prod(shape[axis + 1 :]))))
        if block[axis] > 1:
            break
    return tuple(block)


def tiles(shape: Sequence[int], block: Sequence[int], within: Region | None = None) -> list[Region]:
    """The boxes of shape `block` that fill a tensor, or its region `within`, in row-major order."""
    axes = [
        [slice(i, min(i + n, s.stop)) for i in range(s.start, s.stop, max(1, n))]
        for n, s in zip(block, within or whole(shape), strict=True)
    ]
    return list(itertools.product(*axes))
