"""Kernels of images that lie turned on one side: frames before bands here, bands before frames
there. The image's own sizes say so, and the kernel's values, which then lie turned alike."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from convert.matching.pair import LayerPair, Match
from convert.runtime.arrays import to_numpy
from convert.runtime.trace import Trace
from zoo.layout.ops import Permute, run


def with_turned(
    matches: Iterable[Match], layers: Iterable[LayerPair], tensors: Mapping[str, Any],
    values: Mapping[str, Any], traces: tuple[Trace, Trace],
) -> Iterator[Match]:  # fmt: skip
    """The matches, those of such kernels with the ops that give their values."""
    flax = {p.torch: p.flax for p in layers}
    for match in matches:
        owner = match.torch[0].rpartition(".")[0]
        known = owner in flax and len(match.torch) == 1 and match.flax[0] in values
        if not known or len(match.ops) != 1 or not match.kind.startswith("conv"):
            yield match
            continue
        ours, theirs = to_numpy(tensors[match.torch[0]]), to_numpy(values[match.flax[0]])
        images = _image(traces[0], owner), _image(traces[1], flax[owner])
        yield _turned(match, ours, theirs, images)


def _image(trace: Trace, name: str) -> tuple[int, ...]:
    """The shape of what a layer's first call takes; () where it is not known."""
    call = trace.by_key().get((name, 0))
    return next((x.shape for x in call.inputs.values()), ()) if call else ()


def _turned(
    match: Match, ours: np.ndarray, theirs: np.ndarray, images: tuple[tuple[int, ...], ...]
) -> Match:
    here, there = images[0][2:], images[1][1:-1]
    if here == there or len(here) < 2 or np.array_equal(run(match.ops, [ours])[0], theirs):
        return match
    for order in itertools.permutations(range(len(here))):
        ops = (Permute((*(2 + i for i in order), 1, 0)),)
        lies = tuple(here[i] for i in order) == there
        if lies and np.array_equal(run(ops, [ours])[0], theirs):
            return dataclasses.replace(match, ops=ops)
    return match
