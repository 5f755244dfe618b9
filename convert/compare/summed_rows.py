"""Rows that differ in float32 alone, judged again with the framework's sums in float64."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from convert.compare.sides import Run, Side
from convert.judge.noise import EXACT, Arrays, gap, within
from convert.judge.rows import Row

_Two = tuple[np.ndarray, np.ndarray | None]  # in float32, in float64


class ExactSums:
    """Where float64 agrees, a module computes the right thing, and in float32 XLA's sums on the CPU
    may lose more digits than torch's: an error of theirs is none of the module. What else loses
    digits (E[x^2] - E[x]^2, a cast) still differs. Nothing is run before a row asks for it."""

    def __init__(self, a: Side, b: Side, of: Callable[[Run], Arrays], *, backward: bool) -> None:
        @functools.cache
        def made(side: Side) -> Arrays | None:
            try:
                run = side.exactly_summed(backward=backward)
            except Exception:  # what was found stands
                return None
            return None if run is None else of(run)

        self._made = made
        self._sides = a, b

    def again(self, row: Row, a: _Two, b: _Two) -> Row:
        """The row of these arrays, the same where its sums explain it."""
        if a[1] is None or b[1] is None or row.error64 > EXACT * row.scale:
            return row
        if within(row.error, row.noise, row.scale) or not np.isfinite(row.error):
            return row  # the same, or different for another reason
        rough = []
        for side, (own, _) in zip(self._sides, (a, b), strict=True):
            made = self._made(side)
            rough.append(own if made is None else made[row.name])
        error = gap(*rough)
        if not within(error, row.noise, row.scale):
            return row
        told = f"but for float32 sums, which are {row.ratio:.0f} times as far off"
        note = f"{row.note}; {told}" if row.note else told
        return dataclasses.replace(row, error=error, same=True, note=note)
