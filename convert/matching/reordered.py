"""Layers whose features lie in another order in Flax, as its code takes them: query, key and value
of each head in turn here, all queries before all keys there."""

from __future__ import annotations

import dataclasses

import numpy as np

from convert.matching.effect import helps
from convert.matching.pair import LayerPair, Match, Pair
from convert.matching.rearranged import rearranged
from convert.matching.stacked import in_stacks
from convert.runtime.arrays import to_numpy
from convert.runtime.flax_module import FlaxModule
from convert.runtime.torch_module import state
from convert.runtime.trace import Trace
from zoo.layout.ops import run


def reordered(
    pair: Pair,
    matches: list[Match],
    layers: list[LayerPair],
    side: FlaxModule,
    traces: tuple[Trace, Trace],
) -> tuple[list[Match], list[LayerPair]]:
    """The matches, those of such layers with the ops that give their values; and the layers without
    these, whose results cannot be compared one by one. Values lie so on purpose where Flax comes no
    nearer to torch with them in torch's order: else they are at fault."""
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
        return matches, layers
    put_right = in_stacks(right, side.values, side.stacks)
    if helps(traces[0], side, pair.flax_call, put_right, traces[1]) > (0, 0.0):
        return matches, layers
    owners = {m.torch[0].rpartition(".")[0] for m in found.values()}
    return (
        [found.get(i, m) for i, m in enumerate(matches)],
        [p for p in layers if p.torch not in owners],
    )
