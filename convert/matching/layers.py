"""Which layer of a torch module is which of a Flax module.

The user's own pairs win. Then equal names, then kind, sizes of parameters and order of execution,
aligned like two sequences; containers are those that hold the same layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np

from convert.matching.alignment import moves
from convert.matching.pair import LayerPair, Pair
from convert.runtime.arrays import to_numpy
from convert.runtime.flax_module import FlaxModule, cell_path
from convert.runtime.trace import Trace
from zoo.containers.errors import UsageError
from zoo.layout.kinds import compatible, flax_kind, torch_kind


@dataclass
class CalledLayer:
    """A submodule that was called, on either side."""

    name: str
    kind: str
    sizes: tuple[int, ...]  # numbers of elements of its own parameters with two axes or more
    order: int
    parents: tuple[str, ...]  # the calls around its first call, from outside
    shape: tuple[int, ...]  # of what its first call gives
    total: tuple[int, ...] = ()  # numbers of elements of all parameters in it
    numbers: Callable[[], np.ndarray] = lambda: np.zeros(0)  # all these, in order of size
    held: Callable[[], frozenset[bytes]] = frozenset  # the numbers of each of its tensors
    # Of each of its tensors the size, the smallest and the largest number, however they lie.
    ranges: Callable[[], frozenset[tuple[int, float, float]]] = frozenset
    pointwise: bool = False  # a convolution over single pixels, which a linear layer is too


Layers = dict[str, CalledLayer]  # by dotted name
Found = dict[str, tuple[str, str]]  # torch name -> Flax path, and by what it was found
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
    _by_order(ours, theirs, found, lambda a, b: bool(a.sizes))
    _containers(ours, theirs, found)
    _by_order(ours, theirs, found, lambda a, b: _within(a, found) == _around(b, found))
    _own_leaves(ours, theirs, found)
    _by_values(ours, theirs, found)
    modules = dict(pair.torch.named_modules())
    layers = []
    for name, layer in ours.items():
        if name in found:
            kind = layer.kind if layer.kind != "other" else type(modules[name]).__name__
            other, why = found[name]
            layers.append(LayerPair(name, other, kind, why, _alternatives(layer, theirs)))
    used = {f for f, _ in found.values()}
    return layers, [n for n in ours if n not in found], [n for n in theirs if n not in used]


def _alternatives(ours: CalledLayer, theirs: Layers) -> int:
    """How many other layers of Flax's are of the same kind and sizes."""
    if ours.kind == "other":
        return 0
    return max(0, sum(_score(ours, x, lambda a, b: True) > 0 for x in theirs.values()) - 1)


def torch_layers(module: Any, trace: Trace) -> Layers:
    """The submodules that were called, in the order of their first call."""
    modules = dict(module.named_modules())
    return {
        name: replace(
            CalledLayer(name, torch_kind(modules[name]), _sizes(_own_shapes(modules[name])), *rest),
            total=_sizes((p.shape for p in modules[name].parameters()), axes=0),
            numbers=partial(_sorted, list(modules[name].parameters())),
            held=partial(_each, [*modules[name].parameters(), *modules[name].buffers()]),
            ranges=cache(partial(_ranges, list(modules[name].parameters(recurse=False)))),
            pointwise=set(np.ravel(getattr(modules[name], "kernel_size", 0))) == {1},
        )
        for name, *rest in _first_calls(trace)
    }


def flax_layers(side: FlaxModule, trace: Trace) -> Layers:
    """As `torch_layers`; a Flax layer's parameters are those below its path at any depth."""
    values = side.unstacked()
    found = {}
    for name, *rest in _first_calls(trace):
        below = [v for n, v in values.items() if not name or n.startswith(f"{name}.")]
        if not below and (cell := cell_path(side, name)):
            below = [v for n, v in values.items() if n.startswith(f"{cell}.")]
        shapes = [np.shape(v) for v in below]
        made = CalledLayer(name, flax_kind(side.modules[name]), _sizes(shapes), *rest)
        numbers = partial(_sorted, below)
        held = partial(_each, below)
        found[name] = replace(
            made, total=_sizes(shapes, axes=0), numbers=numbers, held=held,
            ranges=cache(partial(_ranges, below)),
        )  # fmt: skip
    return found


def _sorted(arrays: list[Any]) -> np.ndarray:
    return np.sort(np.concatenate([to_numpy(x).ravel() for x in arrays]))


def _each(arrays: list[Any]) -> frozenset[bytes]:
    """The numbers of each array, in order of size; not of one that holds a single number only."""
    ordered = (np.sort(to_numpy(x).ravel()) for x in arrays if x.size)
    return frozenset(x.tobytes() for x in ordered if x[0] != x[-1])


def _ranges(arrays: list[Any]) -> frozenset[tuple[int, float, float]]:
    """Not of an array that holds a single number only."""
    made = (to_numpy(x) for x in arrays)
    told = ((x.size, float(x.min()), float(x.max())) for x in made
            if x.size and x.dtype.kind == "f")  # fmt: skip
    return frozenset(r for r in told if r[1] != r[2])


def _own_shapes(module: Any) -> list[tuple[int, ...]]:
    """Shapes of a torch module's own parameters; of a weight that is computed from others
    (weight_norm), the weight's."""
    own = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)}
    normed = "weight_g" in own and "weight_v" in own
    if (normed or hasattr(module, "parametrizations")) and hasattr(module, "weight"):
        own = {n: s for n, s in own.items() if n not in ("weight_g", "weight_v")}
        own["weight"] = tuple(module.weight.shape)
    return list(own.values())


def _first_calls(trace: Trace) -> list[Any]:
    """(name, order, calls around it, shape of its first output) of each submodule's first call."""
    by_order = {c.order: c for c in trace.calls}
    found: dict[str, tuple[Any, ...]] = {}
    for call in trace.calls:
        if call.name in found:
            continue
        around: list[str] = []
        parent = call.parent
        while parent is not None:
            around.append(by_order[parent].name)
            parent = by_order[parent].parent
        shape = next((x.shape for x in call.outputs.values()), ())
        found[call.name] = call.order, tuple(reversed(around)), shape
    return [(name, *rest) for name, rest in found.items()]


def _sizes(shapes: Any, axes: int = 2) -> tuple[int, ...]:
    return tuple(sorted(int(np.prod(s)) for s in shapes if len(s) >= axes))


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
    return _of_one_kind(ours, theirs) and _same_sizes(ours, theirs)


def _of_one_kind(ours: CalledLayer, theirs: CalledLayer) -> bool:
    """Whether these can be the same layer."""
    return compatible(ours.kind, theirs.kind) or (
        ours.pointwise and ours.kind.startswith("conv") and theirs.kind == "linear"
    )


def _same_sizes(ours: CalledLayer, theirs: CalledLayer) -> bool:
    if ours.kind == "recurrent":
        return sum(ours.sizes) == sum(theirs.sizes)
    if ours.kind == "attention":  # fused on one side, apart on the other
        return sum(ours.sizes) <= sum(theirs.sizes)
    return ours.sizes == theirs.sizes


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
        alike = np.array_equal(x.numbers(), y.numbers())  # their values tell, if they are right
        return 1.0 + 0.5 * (names[0] == names[1]) + alike if moves(x.shape, y.shape) else -1.0

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
    if not (_of_one_kind(ours, theirs) and _same_sizes(ours, theirs) and may(ours, theirs)):
        return -1.0
    if not ours.sizes and not moves(ours.shape, theirs.shape):
        return -1.0
    last = [normal(x.name).rpartition(".")[2] for x in (ours, theirs)]
    alike = bool(ours.ranges()) and ours.ranges() <= theirs.ranges()
    return (8.0 if ours.sizes else 1.0) + 0.5 * (last[0] == last[1]) + 2.0 * alike


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
