"""Which layer of a torch module is which of a Flax module.

The user's own pairs win. Then equal names, then kind, sizes of parameters and order of execution,
aligned like two sequences; containers are those that hold the same layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from convert.matching.alignment import moves
from convert.matching.called import (
    CalledLayer,
    Found,
    Layers,
    alike,
    flax_layers,
    ranges_of,
    torch_layers,
)
from convert.matching.directions import exchanged
from convert.matching.pair import LayerPair, Pair
from convert.matching.revalued import reshaped, revalued
from convert.runtime.arrays import to_numpy
from convert.runtime.pure_module import FlaxModule
from convert.runtime.trace import Trace
from zoo.containers.errors import UsageError
from zoo.layout.kinds import compatible

_STACKED = 256  # layers in one array
May = Callable[[CalledLayer, CalledLayer], bool]  # whether two layers are to be considered


def pair_layers(
    pair: Pair, torch_trace: Trace, side: FlaxModule, flax_trace: Trace
) -> tuple[list[LayerPair], list[str], list[str]]:
    """The pairs in torch's order of execution, and torch's and Flax's layers without a counterpart.

    UsageError where a pair that the user gives names a layer that is not called.
    """
    ours = torch_layers(pair.torch, torch_trace)
    theirs = flax_layers(side, flax_trace)
    found: Found = {"": ("", "name")} if "" in theirs and "" in ours else {}
    _given(pair, ours, theirs, found)
    _by_name(side, ours, theirs, found)
    every = ours
    ours = _without_stacked(ours, theirs, found, side)
    _by_order(ours, theirs, found, lambda a, b: bool(a.sizes))
    found |= reshaped(ours, theirs, found)
    found |= revalued(pair, ours, theirs, found, side, (torch_trace, flax_trace))
    _containers(ours, theirs, found)
    _by_order(ours, theirs, found, lambda a, b: _within(a, found) == _around(b, found))
    found |= revalued(pair, ours, theirs, found, side, (torch_trace, flax_trace))
    _own_leaves(ours, theirs, found)
    ours = every
    _by_values(ours, theirs, found)
    found |= exchanged(ours, theirs, found, (torch_trace, flax_trace))
    modules = dict(pair.torch.named_modules())
    layers = []
    for name, layer in ours.items():
        if name in found:
            kind = layer.kind if layer.kind != "other" else type(modules[name]).__name__
            other, why = found[name]
            layers.append(LayerPair(name, other, kind, why, _alternatives(layer, theirs)))
    used = {f for f, _ in found.values()}
    return layers, [n for n in ours if n not in found], [n for n in theirs if n not in used]


def _without_stacked(ours: Layers, theirs: Layers, found: Found, side: FlaxModule) -> Layers:
    """torch's layers without those whose weights lie in Flax's as one of several in one array, and
    in no layer: these have no layer for a counterpart."""
    parts = (
        part
        for x in side.unstacked().values()
        if np.ndim(x) > 1 and 1 < np.shape(x)[0] <= _STACKED
        for part in to_numpy(x)
    )
    slices = ranges_of(parts)
    layers = [x.ranges() for x in theirs.values() if x.kind != "other"]

    def is_stacked(layer: CalledLayer) -> bool:
        own = layer.ranges() if layer.sizes else frozenset()
        return bool(own) and own <= slices and not any(own <= held for held in layers)

    return {n: x for n, x in ours.items() if n in found or not is_stacked(x)}


def _alternatives(ours: CalledLayer, theirs: Layers) -> int:
    """How many other layers of Flax's are of the same kind and sizes."""
    if ours.kind == "other":
        return 0
    return max(0, sum(_score(ours, x, lambda a, b: True) > 0 for x in theirs.values()) - 1)


def _given(
    pair: Pair,
    ours: Layers,
    theirs: Layers,
    found: Found,
) -> None:
    wrong = [f"torch calls no {t!r}" for t in pair.layers if t not in ours]
    wrong += [f"Flax calls no {f!r}" for f in pair.layers.values() if f not in theirs]
    if wrong:
        raise UsageError(
            f"layers that were given as pairs: {'; '.join(wrong)}",
            "give dotted paths of submodules that the forward pass calls",
        )
    for t, f in pair.layers.items():
        found[t] = f, "given"


def _by_name(
    side: FlaxModule,
    ours: Layers,
    theirs: Layers,
    found: Found,
) -> None:
    used = {f for f, _ in found.values()}
    by_name: dict[str, str] = {}
    for f in theirs:
        if f not in used:
            by_name.setdefault(normal(_without_sequential(side, f)), f)
    for t, layer in ours.items():
        other = by_name.get(normal(t))
        if t not in found and other is not None and _same_sort(layer, theirs[other]):
            found[t] = other, "name"
            del by_name[normal(t)]


def _without_sequential(side: FlaxModule, path: str) -> str:
    """nn.Sequential's children are `net.0` in torch, `net.layers.0` or `net.layers_0` in Flax."""
    parts, made = path.split("."), []
    for i, part in enumerate(parts):
        parent = side.modules.get(".".join(parts[:i]))
        if type(parent).__name__ == "Sequential":
            if part == "layers":
                continue
            part = part.removeprefix("layers_")
        made.append(part)
    return ".".join(made)


def _same_sort(ours: CalledLayer, theirs: CalledLayer) -> bool:
    if ours.kind == "other" or theirs.kind == "other":
        return True  # one's own class may stand for any: the name says it
    return alike(ours, theirs)


def _by_order(
    ours: Layers,
    theirs: Layers,
    found: Found,
    may: May,
) -> None:
    """Leaves that are left, aligned in their order; a pair must be of one kind and size.

    The score prefers equal last names, so that `norm1` meets `norm1` where either would do.
    """
    used = {f for f, _ in found.values()}
    a = [x for n, x in ours.items() if n not in found and x.kind != "other"]
    b = [x for n, x in theirs.items() if n not in used and x.kind != "other"]
    _aligned(a, b, found, lambda x, y: _score(x, y, may))


def _own_leaves(ours: Layers, theirs: Layers, found: Found) -> None:
    """Layers of somebody's own that call no other, on one side at least, in one container: those
    that hold as many numbers, aligned in their order."""
    used = {f for f, _ in found.values()}
    a = [x for n, x in ours.items() if n not in found and x.total and _calls_none(x, ours)]
    b = [x for n, x in theirs.items() if n not in used and x.total and _calls_none(x, theirs)]

    def score(x: CalledLayer, y: CalledLayer) -> float:
        same = "other" in (x.kind, y.kind) or compatible(x.kind, y.kind)
        if not same or x.total != y.total or _within(x, found) != _around(y, found):
            return -1.0
        names = [normal(layer.name).rpartition(".")[2] for layer in (x, y)]
        equal = np.array_equal(x.numbers(), y.numbers())  # their values tell, if they are right
        return 1.0 + 0.5 * (names[0] == names[1]) + equal if moves(x.shape, y.shape) else -1.0

    _aligned(a, b, found, score)


def _by_values(ours: Layers, theirs: Layers, found: Found) -> None:
    """Leaves that are left though they hold the very same numbers: called in another order, or
    inside another container. Only where no second layer holds them."""
    used = {f for f, _ in found.values()}
    left = {n: x.held() for n, x in ours.items() if n not in found and x.kind != "other"}
    free = {n: x.held() for n, x in theirs.items() if n not in used and x.kind != "other"}
    for t, held in left.items():
        able = [
            f for f, h in free.items() if compatible(ours[t].kind, theirs[f].kind) and held <= h
        ]
        if held and len(able) == 1:
            found[t] = able[0], "values"
            del free[able[0]]


def _calls_none(layer: CalledLayer, layers: Layers) -> bool:
    """Whether no layer with parameters is called inside; what computes a layer's own weight
    (`parametrizations`) is a part of it."""
    within = f"{layer.name}.parametrizations."
    return not any(
        layer.name in x.parents and x.total and not x.name.startswith(within)
        for x in layers.values()
    )


def _aligned(
    a: list[CalledLayer],
    b: list[CalledLayer],
    found: Found,
    scored: Callable[[CalledLayer, CalledLayer], float],
) -> None:
    """The best alignment of two sequences into `found`."""
    best = np.zeros((len(a) + 1, len(b) + 1))
    for i in range(len(a) - 1, -1, -1):
        for j in range(len(b) - 1, -1, -1):
            score = scored(a[i], b[j])
            best[i, j] = max(best[i + 1, j], best[i, j + 1], score + best[i + 1, j + 1])
    i = j = 0
    while i < len(a) and j < len(b):
        score = scored(a[i], b[j])
        if score > 0 and best[i, j] == score + best[i + 1, j + 1]:
            found[a[i].name] = b[j].name, "order"
            i, j = i + 1, j + 1
        elif best[i, j] == best[i + 1, j]:
            i += 1
        else:
            j += 1


def _within(layer: CalledLayer, found: Found) -> str | None:
    """The innermost paired module around a torch layer, as Flax calls it."""
    return next((found[p][0] for p in reversed(layer.parents) if p in found), None)


def _around(layer: CalledLayer, found: Found) -> str | None:
    """The innermost paired module around a Flax layer."""
    paired = {f for f, _ in found.values()}
    return next((p for p in reversed(layer.parents) if p in paired), None)


def _score(ours: CalledLayer, theirs: CalledLayer, may: May) -> float:
    if not (alike(ours, theirs) and may(ours, theirs)):
        return -1.0
    if not ours.sizes and not moves(ours.shape, theirs.shape):
        return -1.0
    last = [normal(x.name).rpartition(".")[2] for x in (ours, theirs)]
    equal = bool(ours.ranges()) and ours.ranges() <= theirs.ranges()
    # What is equal counts less than a pair more: two that are exchanged are still two pairs.
    size, worth = (8.0, 2.0) if ours.sizes else (1.0, 0.4)
    return size + 0.5 * (last[0] == last[1]) + worth * equal


def _containers(ours: Layers, theirs: Layers, found: Found) -> None:
    """Modules of one's own that hold the same paired layers, the innermost first."""
    used = {f for f, _ in found.values()}
    back = {f: t for t, (f, _) in found.items()}
    held: dict[frozenset[str], list[str]] = {}
    for f, layer in theirs.items():
        inside = frozenset(back[n] for n, x in theirs.items() if f in x.parents and n in back)
        if f not in used and layer.kind == "other" and inside:
            held.setdefault(inside, []).append(f)
    for t, layer in reversed(ours.items()):
        inside = frozenset(n for n, x in ours.items() if t in x.parents and n in found)
        leaves = frozenset(n for n in inside if found[n][1] != "container")
        if t in found or layer.kind != "other" or not leaves:
            continue
        if candidates := held.get(leaves):
            found[t] = candidates.pop(), "container"
    for t, (f, why) in list(found.items()):
        found[t] = f, "order" if why == "container" else why


def normal(name: str) -> str:
    """A path as both frameworks would spell it: `layers_0` is `layers.0`, case does not count."""
    return re.sub(r"_(\d+)(?=\.|$)", r".\1", name).lower()
