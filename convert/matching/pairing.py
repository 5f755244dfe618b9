"""Which layer, and which tensor, of a torch module is which of a Flax module: the whole answer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convert.matching.bare import match_copies
from convert.matching.layers import pair_layers
from convert.matching.pair import LayerPair, Match, Pair
from convert.matching.parameters import pair_tensors, unmatched
from convert.matching.reordered import comparable, reordered
from convert.matching.stacked import restacked
from convert.matching.turned import with_turned
from convert.runtime.arrays import to_numpy
from convert.runtime.flax_calls import record
from convert.runtime.flax_module import flax_module
from convert.runtime.pure_module import FlaxModule
from convert.runtime.torch_calls import trace_torch
from convert.runtime.torch_module import state
from convert.runtime.torch_recurrent import unstack
from convert.runtime.trace import Trace
from zoo.layout import Constant, Entry, Layout, Tensor, constant, tie

Shapes = Mapping[str, tuple[int, ...]]
_COUNTER = "num_batches_tracked"  # of torch's BatchNorm; Flax has none, and outputs need none


@dataclass
class Pairing:
    """`layers` are the pairs of layers, those without tensors too, in torch's order of execution;
    each says by what it was found. `matches` are the pairs of tensors. What has no counterpart is
    in `layers_left` and `tensors_left`, each (torch's, Flax's)."""

    layers: list[LayerPair]
    matches: tuple[Match, ...]
    layers_left: tuple[list[str], list[str]]
    tensors_left: tuple[list[str], list[str]]
    shapes: Shapes = field(repr=False)  # of torch's state, ties and counters included
    flax_shapes: Shapes = field(repr=False)
    ties: Mapping[str, str] = field(repr=False)  # torch's further names -> the first one
    statistics: frozenset[str] = field(repr=False)  # Flax's running statistics
    notes: list[str] = field(default_factory=list)

    def of_flax(self) -> dict[str, LayerPair]:
        """Flax path -> pair."""
        return {p.flax: p for p in self.layers}

    def of_torch(self) -> dict[str, LayerPair]:
        """torch name -> pair."""
        return {p.torch: p for p in self.layers}

    @property
    def complete(self) -> bool:
        """Whether every tensor of either side has its counterpart."""
        return not any(self.tensors_left)

    def layout(self) -> Layout:
        """The matches as a layout, such as a model of the zoo states: with torch's ties and
        counters, without what is left. ValueError where matches that were given contradict."""
        return Layout(self._entries())

    def _entries(self) -> Iterator[Entry]:
        matched = {m.torch[0]: m for m in self.matches}
        within = {n for m in self.matches for n in m.torch}
        for name, shape in self.shapes.items():
            if name in matched:
                m = matched[name]
                moving = all(n in self.statistics for n in m.flax)
                yield Entry(
                    m.kind,
                    tuple(Tensor(n, self.shapes[n]) for n in m.torch),
                    tuple(Tensor(n, self.flax_shapes[n]) for n in m.flax),
                    m.ops,
                    "batch_stats" if moving else "params",
                )
            elif self.ties.get(name) in within:
                yield tie(name, shape, self.ties[name])
            elif name.endswith(_COUNTER):
                yield constant(name, shape, Constant("zeros", "I64", True))


def pair_modules(pair: Pair) -> Pairing:
    """The pairing of two modules, each of which is run once.

    `pair.layers` and `pair.matches`, where given, are taken as they are; UsageError where the
    former names a layer that is not called. The two biases of a torch recurrent layer have no match
    where Flax's cell has one: their sum is not an op.
    """
    pair = dataclasses.replace(pair, torch=unstack(copy.deepcopy(pair.torch)))
    side = flax_module(pair.flax, "float32")
    traces = trace_torch(pair.torch, pair.call), record(side, pair.flax_call)
    return pair_traces(pair, traces[0], side, traces[1])


def pair_traces(pair: Pair, torch_trace: Trace, side: FlaxModule, flax_trace: Trace) -> Pairing:
    """As `pair_modules`, from runs that were made before."""
    layers, *layers_left = pair_layers(pair, torch_trace, side, flax_trace)
    tensors = state(pair.torch)
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    ties = {n: first[id(t)] for n, t in tensors.items() if first[id(t)] != n}
    matches = pair.matches
    if matches is None:
        found = pair_tensors(pair.torch, layers, side)
        traces = torch_trace, flax_trace
        turned = list(with_turned(found, layers, tensors, side.unstacked(), traces))
        found = reordered(pair, turned, side, traces)
        matches = tuple(restacked(found, side.stacks))
        matches += tuple(_copies(ties, matches, tensors, side))
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    layers = comparable(layers, matches, shapes)
    return Pairing(
        layers,
        matches,
        (layers_left[0], layers_left[1]),
        unmatched(pair.torch, side, matches),
        shapes,
        {n: tuple(np.shape(v)) for n, v in side.values.items()},
        ties,
        frozenset(side.statistics),
        [*torch_trace.notes, *flax_trace.notes],
    )


def _copies(
    ties: Mapping[str, str], matches: Iterable[Match], tensors: Mapping[str, Any], side: FlaxModule
) -> Iterator[Match]:
    """What torch has once and Flax twice is matched twice: each copy gets a gradient of its own."""
    taken = {n for m in matches for n in m.flax}
    left = {n: to_numpy(v) for n, v in side.params.items() if n not in taken}
    if ties and left:
        named = {n: to_numpy(tensors[n]) for n in {*ties, *ties.values()}}
        yield from match_copies(named, left, ties, matches)
