"""Recurrent layers that go through a sequence back to front: torch's turn it round within the
layer, a Flax layer may get it turned round, and give what it makes of it so."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from convert.matching.alignment import gap, moves, to_flax
from convert.matching.called import Found, Layers
from convert.runtime.trace import Trace

REVERSE = "_reverse"  # how torch's names of such layers end
_NEAR = 1e-5  # of the largest value
AS_IT_IS = -1
Arrays = dict[str, np.ndarray]


def turned_axis(torch: Mapping[str, np.ndarray], flax: Mapping[str, np.ndarray]) -> int | None:
    """The axis along which Flax's largest input is torch's back to front, AS_IT_IS where it is
    torch's; None where it is neither."""
    if not torch or not flax:
        return None
    x, y = (max(side.values(), key=np.size) for side in (torch, flax))
    ways = [to_flax(x, move, y.shape) for move in moves(x.shape, y.shape)] if y.ndim > 2 else []
    near = _NEAR * float(np.abs(x).max(initial=0.0))
    if any(gap(way, y) <= near for way in ways):
        return AS_IT_IS
    able = (axis for axis in (0, 1) for way in ways if gap(np.flip(way, axis), y) <= near)
    return next(able, None)


def turned(arrays: Mapping[str, np.ndarray], axis: int, steps: tuple[int, ...]) -> Arrays:
    """The sequences among them back to front: those with these first two sizes."""
    return {k: np.flip(x, axis) if x.shape[:2] == steps else x for k, x in arrays.items()}


def exchanged(ours: Layers, theirs: Layers, found: Found, traces: tuple[Trace, Trace]) -> Found:
    """The two directions of a layer that were paired in the order in which they are called, the
    other way round: where what they are given says so, or, where it says nothing, their values."""
    calls = [trace.by_key() for trace in traces]

    def turns(name: str, flax: str) -> bool | None:
        """Whether Flax's layer goes back to front; None where its inputs do not tell."""
        a, b = calls[0].get((name, 0)), calls[1].get((flax, 0))
        if a is None or b is None:
            return None
        axis = turned_axis(a.inputs, b.inputs)
        return None if axis is None else axis != AS_IT_IS

    def holds(name: str, flax: str) -> bool:
        held = ours[name].ranges()
        return bool(held) and held <= theirs[flax].ranges()

    made: Found = {}
    for back in (n for n in found if n.endswith(REVERSE) and n.removesuffix(REVERSE) in found):
        forth = back.removesuffix(REVERSE)
        (f, why), (b, _) = found[forth], found[back]
        if why == "given":
            continue
        told = turns(forth, f), turns(forth, b)
        values = holds(forth, b) and holds(back, f) and not holds(forth, f)
        if told == (True, False) or (told == (None, None) and values):
            made |= {forth: (b, "order"), back: (f, "order")}
    return made
