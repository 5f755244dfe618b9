"""The submodules that a run calls, on either side, with what tells which is which."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np

from convert.runtime.arrays import to_numpy
from convert.runtime.pure_module import FlaxModule, cell_path
from convert.runtime.trace import Trace
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


def torch_layers(module: Any, trace: Trace) -> Layers:
    """The submodules that were called, in the order of their first call."""
    modules = dict(module.named_modules())
    return {
        name: replace(
            CalledLayer(name, torch_kind(modules[name]), _sizes(_own_shapes(modules[name])), *rest),
            total=_sizes((p.shape for p in modules[name].parameters()), axes=0),
            numbers=partial(_sorted, list(modules[name].parameters())),
            held=partial(_each, [*modules[name].parameters(), *modules[name].buffers()]),
            ranges=cache(partial(ranges_of, list(modules[name].parameters(recurse=False)))),
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
            ranges=cache(partial(ranges_of, below)),
        )  # fmt: skip
    return found


def _sorted(arrays: list[Any]) -> np.ndarray:
    return np.sort(np.concatenate([to_numpy(x).ravel() for x in arrays]))


def _each(arrays: list[Any]) -> frozenset[bytes]:
    """The numbers of each array, in order of size; not of one that holds a single number only."""
    ordered = (np.sort(to_numpy(x).ravel()) for x in arrays if x.size)
    return frozenset(x.tobytes() for x in ordered if x[0] != x[-1])


def ranges_of(arrays: Iterable[Any]) -> frozenset[tuple[int, float, float]]:
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


def alike(ours: CalledLayer, theirs: CalledLayer) -> bool:
    """Whether these can be the same layer, by kind and sizes."""
    return of_one_kind(ours, theirs) and same_sizes(ours, theirs)


def of_one_kind(ours: CalledLayer, theirs: CalledLayer) -> bool:
    """Whether these can be the same layer."""
    return compatible(ours.kind, theirs.kind) or (
        ours.pointwise and ours.kind.startswith("conv") and theirs.kind == "linear"
    )


def same_sizes(ours: CalledLayer, theirs: CalledLayer) -> bool:
    if ours.kind == "recurrent":
        return sum(ours.sizes) == sum(theirs.sizes)
    if ours.kind == "attention":  # fused on one side, apart on the other
        return sum(ours.sizes) <= sum(theirs.sizes)
    return ours.sizes == theirs.sizes
