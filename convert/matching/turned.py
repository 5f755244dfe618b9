"""Kernels of images that lie turned on one side: frames before bands here, bands before frames
there; or flattened channel first here, channel last there. What the layer is given says so, and the
kernel's values, which then lie alike."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from convert.judge.noise import gap, largest
from convert.matching.by_values import reorders
from convert.matching.pair import LayerPair, Match
from convert.runtime.arrays import to_numpy
from convert.runtime.trace import Trace
from zoo.layout.ops import Permute, Reorder, run

_NEAR = 2.0**-10  # of the scale: values as far apart as that are one another's


def with_turned(
    matches: Iterable[Match], layers: Iterable[LayerPair], tensors: Mapping[str, Any],
    values: Mapping[str, Any], traces: tuple[Trace, Trace],
) -> Iterator[Match]:  # fmt: skip
    """The matches, those of such kernels with the ops that give their values."""
    flax = {p.torch: p.flax for p in layers}
    for match in matches:
        owner = match.torch[0].rpartition(".")[0]
        known = owner in flax and len(match.torch) == 1 and match.flax[0] in values
        rule = _flattened if match.kind == "linear" else _turned
        image = match.kind == "linear" or match.kind.startswith("conv")
        if not known or len(match.ops) != 1 or not image:
            yield match
            continue
        ours, theirs = to_numpy(tensors[match.torch[0]]), to_numpy(values[match.flax[0]])
        here, there = _given(traces[0], owner), _given(traces[1], flax[owner])
        if here is None or there is None or np.array_equal(run(match.ops, [ours])[0], theirs):
            yield match
        else:
            yield rule(match, ours, theirs, (here, there))


def _given(trace: Trace, name: str) -> np.ndarray | None:
    """What a layer's first call takes; None where it is not known."""
    call = trace.by_key().get((name, 0))
    return next(iter(call.inputs.values()), None) if call else None


def _turned(
    match: Match, ours: np.ndarray, theirs: np.ndarray, given: tuple[np.ndarray, np.ndarray]
) -> Match:
    here, there = given[0].shape[2:], given[1].shape[1:-1]
    if here == there or len(here) < 2:
        return match
    for order in itertools.permutations(range(len(here))):
        ops = (Permute((*(2 + i for i in order), 1, 0)),)
        lies = tuple(here[i] for i in order) == there
        if lies and np.array_equal(run(ops, [ours])[0], theirs):
            return dataclasses.replace(match, ops=ops)
    return match


def _flattened(
    match: Match, ours: np.ndarray, theirs: np.ndarray, given: tuple[np.ndarray, np.ndarray]
) -> Match:
    """The kernel of a linear layer whose inputs, and rows, are in another order in Flax."""
    here, there = given
    if here.shape != there.shape or here.dtype.kind != "f":
        return match
    for op in reorders(run(match.ops, [ours])[0], theirs):
        last = Reorder(here.ndim - 1, op.sizes, op.order)
        if op.axis == 0 and gap(run((last,), [here])[0], there) <= _NEAR * largest(there):
            return dataclasses.replace(match, ops=(*match.ops, op))
    return match
