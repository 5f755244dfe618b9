"""Orders of axes: an array of the graph lies in an order, where axis k is torch's axis `order[k]`.

Everything is said in torch's axes and worked out here: which axis is meant, what order a result of
other axes has, and whether a reshape can be one of the array as it lies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from convert.porting.rendering.sizes import sampled

Order = tuple[int, ...]
Size = int | str


def plain(n: int) -> Order:
    """torch's own order."""
    return tuple(range(n))


def last(n: int) -> Order:
    """Channels, torch's axis 1, last: (0, 2, 3, 1)."""
    return (0, *range(2, n), 1)


def in_order(values: Sequence, order: Order) -> list:
    """What stands at torch's axes, as the array lies."""
    return [values[a] for a in order]


def turn(before: Order, after: Order) -> Order:
    """The permutation that makes one order of another."""
    return tuple(before.index(a) for a in after)


def without(order: Order, gone: Sequence[int]) -> Order:
    """The order of what is left where these axes of torch's are taken away."""
    kept = [a for a in range(len(order)) if a not in gone]
    return tuple(kept.index(a) for a in order if a in kept)


def trailing(order: Order, n: int) -> tuple[Order, tuple[int, ...]]:
    """For an array of the last n of torch's axes beside one in this order: the order that it takes,
    and where axes of size 1 then have to be put in."""
    missing = len(order) - n
    own = tuple(a - missing for a in order if a >= missing)
    first = next((k for k, a in enumerate(order) if a >= missing), len(order))
    return own, tuple(k - first for k, a in enumerate(order) if a < missing and k > first)


def permuted(order: Order, axes: Order) -> Order:
    """The order of torch's `x.permute(axes)` where x lies in `order` and nothing is moved."""
    return tuple(axes.index(a) for a in order)


def before_permuted(order: Order, axes: Order) -> Order:
    """The order of x in which its `x.permute(axes)` lies in `order` without a move."""
    return tuple(axes[a] for a in order)


# -- reshapes -----------------------------------------------------------------------------------

Block = tuple[tuple[int, ...], tuple[int, ...]]  # axes before and after, of one product


def blocks(before: Sequence[Size], after: Sequence[Size]) -> list[Block] | None:
    """The smallest groups of axes that a reshape makes into one another; axes of size 1 are in
    none. None where the sizes do not tell."""
    try:
        old = [(a, n) for a, s in enumerate(before) if (n := sampled(s)) != 1]
        new = [(a, n) for a, s in enumerate(after) if (n := sampled(s)) != 1]
    except Exception:  # an expression that these numbers are not for
        return None
    made: list[Block] = []
    while old or new:
        if not old or not new:
            return None
        left, right = [old.pop(0)], [new.pop(0)]
        while (a := math.prod(n for _, n in left)) != (b := math.prod(n for _, n in right)):
            side, more = (left, old) if a < b else (right, new)
            if not more:
                return None
            side.append(more.pop(0))
        made.append((tuple(a for a, _ in left), tuple(a for a, _ in right)))
    return made


def reshaped(
    order: Order, before: Sequence[Size], after: Sequence[Size], wanted: Order | None
) -> Order | None:
    """The order of what torch's reshape gives where the array as it lies is reshaped, `wanted` if
    that can be; None where only torch's own order will do."""
    found = blocks(before, after)
    if found is None:
        return None
    seen = [a for a in order if any(a in old for old, _ in found)]
    sequence: list[int] = []
    while seen:
        old, new = next(b for b in found if seen[0] in b[0])
        if tuple(seen[: len(old)]) != old:
            return None
        sequence += new
        seen = seen[len(old) :]
    n = len(after)
    ones = [a for a in range(n) if a not in sequence]
    for candidate in (wanted, plain(n), last(n) if n > 2 else None):
        if candidate is not None and [a for a in candidate if a not in ones] == sequence:
            return candidate
    for one in ones:  # behind the axis that it stands behind in torch
        at = sequence.index(one - 1) + 1 if one and one - 1 in sequence else 0
        sequence.insert(at, one)
    return tuple(sequence)


def before_reshaped(order: Order, before: Sequence[Size], after: Sequence[Size]) -> Order | None:
    """The order of x in which torch's reshape of it lies in `order` without a move."""
    found = reshaped(order, after, before, None)
    return found if found is not None and len(found) == len(before) else None


def channels_moved(order: Order) -> bool:
    """Whether an order is torch's with one axis moved to the end, as an image's of Flax is."""
    moved = order[-1] if order else 0
    return order != plain(len(order)) and order == (*_others(len(order), moved), moved)


def _others(n: int, without_: int) -> Order:
    return tuple(a for a in range(n) if a != without_)


def axis_names(order: Order, shape: Sequence[Size]) -> Callable[[int], str]:
    """What an image's axis is called: B, C, and those of space."""
    space = {3: "T", 4: "HW", 5: "DHW"}.get(len(order), "")
    names = dict(zip(itertools.count(2), space, strict=False))
    names |= {0: "B", 1: "C"}
    return lambda axis: names.get(axis, str(axis))
