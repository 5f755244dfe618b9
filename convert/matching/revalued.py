"""Layers that were paired by their order although they hold each other's numbers: called in another
order on one side, or really exchanged."""

from __future__ import annotations

from typing import Any

from convert.matching.alignment import moves
from convert.matching.called import CalledLayer, Found, Layers, alike
from convert.matching.effect import helps
from convert.matching.pair import Pair
from convert.runtime.pure_module import FlaxModule
from convert.runtime.trace import Trace


def revalued(
    pair: Pair, ours: Layers, theirs: Layers, found: Found, side: FlaxModule,
    traces: tuple[Trace, Trace],
) -> Found:  # fmt: skip
    """The pairs of such layers by the numbers that they hold. None where Flax comes nearer to
    torch with these numbers in each other's place: then the numbers are at fault, not the pairs."""
    wrong = {
        t: f
        for t, (f, why) in found.items()
        if why == "order" and ours[t].kind != "other" and not _holds(theirs[f], ours[t])
    }
    moved: dict[str, str] = {}
    for t in wrong:
        able = [f for f in wrong.values() if alike(ours[t], theirs[f])]
        able = [f for f in able if _holds(theirs[f], ours[t])]
        if len(able) == 1:
            moved[t] = able[0]
    while left := _alone(wrong, moved):
        moved = {t: f for t, f in moved.items() if t not in left}
    if len(set(moved.values())) < len(moved) or not moved:
        return {}
    exchanged = _exchanged(side, {wrong[t]: f for t, f in moved.items()})
    if exchanged is None or helps(traces[0], side, pair.flax_call, exchanged, traces[1])[0] > 0:
        return {}
    return {t: (f, "values") for t, f in moved.items()}


def reshaped(ours: Layers, theirs: Layers, found: Found) -> Found:
    """Pairs by order of layers that give arrays of other shapes, exchanged so that shapes fit: one
    side calls them in another order."""

    def fits(t: str, f: str) -> bool:
        return alike(ours[t], theirs[f]) and bool(moves(ours[t].shape, theirs[f].shape))

    wrong = {
        t: f
        for t, (f, why) in found.items()
        if why == "order" and ours[t].kind != "other" and not fits(t, f)
    }
    able = {t: [f for f in wrong.values() if fits(t, f)] for t in wrong}
    moved = {t: fitting[0] for t, fitting in able.items() if len(fitting) == 1}
    while left := _alone(wrong, moved):
        moved = {t: f for t, f in moved.items() if t not in left}
    return {t: (f, "order") for t, f in moved.items()}


def _holds(theirs: CalledLayer, ours: CalledLayer) -> bool:
    return ours.ranges() <= theirs.ranges()


def _alone(wrong: dict[str, str], moved: dict[str, str]) -> set[str]:
    """What is no part of an exchange: nobody takes its place, or it takes nobody's."""
    places = {wrong[t] for t in moved}
    return {t for t, f in moved.items() if wrong[t] not in moved.values() or f not in places}


def _exchanged(side: FlaxModule, instead: dict[str, str]) -> dict[str, Any] | None:
    """Flax's values with those of a layer in the place of another's; None where shapes differ, or
    a scanned stack holds them."""
    made: dict[str, Any] = {}
    for place, holder in instead.items():
        below = [n for n in side.values if n.startswith(f"{place}.")]
        for name in below:
            other = side.values.get(f"{holder}{name.removeprefix(place)}")
            if other is None or other.shape != side.values[name].shape:
                return None
            made[name] = other
        if not below:
            return None
    return made
