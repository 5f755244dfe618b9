"""What of torch's run Flax's run has too, layers paired or not: by that a change of Flax's tensors
is seen to help, or not to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.runtime.call import Call
from convert.runtime.flax_calls import record
from convert.runtime.pure_module import FlaxModule
from convert.runtime.trace import Trace

_NEAR = 1e-4  # of the largest value: no more than rounding
_NEARER = 3  # times, for a value that is counted as nearer


def helps(
    ours: Trace,
    side: FlaxModule,
    call: Call,
    values: Mapping[str, Any],
    theirs: Trace | None = None,
) -> tuple[int, float]:
    """How many of torch's values Flax's run comes nearer to with these values in place of its own,
    so near that rounding explains the rest, less those that it comes farther from; and by how much
    it comes nearer in all. `theirs` is the run with its own, where that is known."""
    before = theirs or record(side, call)
    held = side.values
    side.values = {**held, **values}
    try:
        after = record(side, call)
    finally:
        side.values = held
    first, then = (distances(ours, trace) for trace in (before, after))
    nearer = sum(b <= _NEAR and b < a / _NEARER for a, b in zip(first, then, strict=True))
    farther = sum(a <= _NEAR and a < b / _NEARER for a, b in zip(first, then, strict=True))
    moved = sum(min(a, 1.0) - min(b, 1.0) for a, b in zip(first, then, strict=True))
    return nearer - farther, moved


def distances(ours: Trace, theirs: Trace) -> list[float]:
    """How far each of torch's values is from the nearest one of Flax's, however that lies."""
    known: dict[int, list[np.ndarray]] = defaultdict(list)
    for _, x in _told(theirs):
        known[x.size].append(_signature(x))
    found = []
    for _, x in _told(ours):
        mine, rows = _signature(x), known.get(x.size)
        scale = float(np.abs(mine).max()) or 1.0
        apart = np.abs(np.stack(rows) - mine).max(1).min() / scale if rows else np.inf
        found.append(float(apart))
    return found


def _told(trace: Trace) -> list[tuple[str, np.ndarray]]:
    """The values of a run that can be told from others."""
    return [
        (call.name, x)
        for call in trace.calls
        for x in (*call.inputs.values(), *call.outputs.values())
        if x.dtype.kind == "f" and x.size > 1 and np.isfinite(x).all() and np.ptp(x) > 0
    ]


def _signature(x: np.ndarray) -> np.ndarray:
    """Numbers that stay where the axes are put in another order."""
    wide = x.astype(np.float64)
    size = float(np.sqrt((wide * wide).mean()))
    cubed = float(np.cbrt((wide * wide * wide).mean()))
    return np.array([wide.mean(), size, cubed, wide.min(), wide.max()])
