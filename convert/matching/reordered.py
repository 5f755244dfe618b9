"""Layers whose features lie in another order in Flax, as its code takes them: query, key and value
of each head in turn here, all queries before all keys there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from convert.matching.effect import helps
from convert.matching.pair import LayerPair, Match, Pair
from convert.matching.rearranged import rearranged
from convert.matching.stacked import in_stacks, layer_by_layer
from convert.runtime.arrays import to_numpy
from convert.runtime.pure_module import FlaxModule
from convert.runtime.torch_module import state
from convert.runtime.trace import Trace
from zoo.layout.ops import run


def reordered(
    pair: Pair, matches: list[Match], side: FlaxModule, traces: tuple[Trace, Trace]
) -> list[Match]:
    """The matches, those of such layers with the ops that give their values. These lie so on
    purpose where Flax comes no nearer to torch with them in torch's order: else they are at fault.
    """
    tensors, values = state(pair.torch), side.unstacked()
    found: dict[int, Match] = {}
    right: dict[str, np.ndarray] = {}
    for i, match in enumerate(matches):
        single = len(match.torch) == len(match.flax) == 1
        if match.kind != "linear" or not single or match.flax[0] not in values:
            continue
        ours = to_numpy(tensors[match.torch[0]])
        theirs = to_numpy(values[match.flax[0]])
        (made,) = run(match.ops, [ours])
        if made.shape != theirs.shape or theirs.ndim < 2 or np.array_equal(made, theirs):
            continue
        if (ops := rearranged(ours, theirs)) is not None:
            found[i] = dataclasses.replace(match, ops=ops)
            right[match.flax[0]] = made.astype(theirs.dtype)
    if not found:
        return matches
    put_right = in_stacks(right, side.values, side.stacks)
    if helps(traces[0], side, pair.flax_call, put_right, traces[1]) > (0, 0.0):
        return matches
    return [found.get(i, m) for i, m in enumerate(matches)]


def comparable(
    layers: list[LayerPair], matches: Iterable[Match], shapes: Mapping[str, tuple[int, ...]]
) -> list[LayerPair]:
    """The layers without those that give their features in another order, whose results cannot be
    compared one by one."""
    single = (one for match in matches for one, _ in layer_by_layer(match))
    turned = {
        m.torch[0].rpartition(".")[0]
        for m in single
        if m.kind == "linear" and len(m.torch) == len(m.flax) == 1 and _turns(m, shapes)
    }
    return [p for p in layers if p.torch not in turned]


def _turns(match: Match, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a matrix's rows, torch's (features, inputs), are in another order in Flax."""
    shape = shapes[match.torch[0]]
    if len(shape) != 2 or len(match.ops) < 2:
        return False
    (places,) = run(match.ops, [np.arange(shape[0] * shape[1]).reshape(shape)])
    rows = places.ravel()[places.ravel() % shape[1] == 0]
    return bool((np.diff(rows) < 0).any())
