"""By which ops tensors of one shape may become tensors of another: all ways that sizes allow.

Both sides are seen as one array each: first the numbers of their layers (a stack), then the axes
of a tensor. Every axis of the target is an axis of the source, or a factor of one; or the other
way round.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from zoo.layout.ops import Merge, Op, Ops, Permute, Shape, Split

_MOST = 64  # ways that are looked at


@dataclass(frozen=True)
class ShapeFit:
    """One way: of each axis of the target, the source's axis that it is of.

    `merged` says that source and target are exchanged: the target's axes hold several of the
    source's, and `axes` is of the way back. `inner` is a target axis that is not the first factor
    of its axis but the second.
    """

    axes: tuple[int, ...]
    merged: bool = False
    inner: int | None = None


@cache
def fits(source: Shape, target: Shape) -> tuple[ShapeFit, ...]:
    """All ways, without axes of length one; none where sizes do not allow any."""
    if math.prod(source) != math.prod(target):
        return ()
    found = [ShapeFit(axes) for axes in _ways(source, target)]
    if not found and len(source) > len(target):
        found = [ShapeFit(axes, True) for axes in _ways(target, source)]
    return tuple(found)


def _ways(source: Shape, target: Shape) -> Iterator[tuple[int, ...]]:
    """Assignments of target axes to source axes under which the sizes multiply up."""
    left = list(source)
    chosen: list[int] = []
    count = 0

    def further(k: int) -> Iterator[tuple[int, ...]]:
        nonlocal count
        if count >= _MOST:
            return
        if k == len(target):
            if all(n == 1 for n in left):
                count += 1
                yield tuple(chosen)
            return
        for axis, n in enumerate(left):
            if n % target[k] == 0 and n > 1:
                left[axis] //= target[k]
                chosen.append(axis)
                yield from further(k + 1)
                chosen.pop()
                left[axis] = n

    yield from further(0)


def tells(x: np.ndarray) -> bool:
    """Whether the values are not all alike, as those of fresh scales and biases are."""
    return x.dtype.kind == "f" and x.size > 1 and bool(np.ptp(x) > 0)


def without_ones(shape: Sequence[int]) -> Shape:
    """The axes that are longer than one."""
    return tuple(n for n in shape if n != 1)


def squeeze(shape: Shape) -> Ops:
    """The ops that merge axes of length one into their neighbours."""
    ops: list[Op] = []
    while 1 in shape and len(shape) > 1:
        k = max(0, shape.index(1) - 1)
        names = ("one", "axis") if shape[k] == 1 else ("axis", "one")
        ops.append(Merge(k, names, shape[k : k + 2]))
        (shape,) = ops[-1].shapes([shape])
    return tuple(ops)


def ops_of(axes: Sequence[int], source: Shape, target: Shape, inner: int | None = None) -> Ops:
    """The ops that make an array of the one shape one of the other, where target axis k is of
    source axis `axes[k]`. Both without axes of length one. Factors are in the target's order but
    for `inner`, which comes second."""
    ops: list[Op] = []
    placed: dict[int, list[int]] = {}
    for k, axis in enumerate(axes):
        placed.setdefault(axis, []).append(k)
    if inner is not None:
        factors_of = placed[axes[inner]]
        factors_of.remove(inner)
        factors_of.insert(1, inner)
    for axis in reversed(range(len(source))):
        factors = tuple(target[k] for k in placed.get(axis, ()))
        if len(factors) > 1:
            names = ("heads", "head_dim") if len(factors) == 2 else tuple(
                f"axis{i}" for i in range(len(factors)))  # fmt: skip
            ops.append(Split(axis, names, factors))
    order = [k for axis in sorted(placed) for k in placed[axis]]
    if order != sorted(order):
        ops.append(Permute(tuple(order.index(k) for k in range(len(target)))))
    return tuple(ops)
