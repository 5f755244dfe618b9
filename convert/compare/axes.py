"""How arrays of one module lie in the other: inputs, intermediates and outputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.compare.blind_spots import BlindSpot
from convert.compare.report import Report
from convert.compare.sides import Axes, title
from convert.matching import alignment
from convert.matching.pair import LayerPair, Pair
from convert.runtime.arrays import named_outputs, to_numpy
from convert.runtime.trace import Place, Trace
from zoo.containers.errors import UsageError

# The move of `alignment`, torch's shape, Flax's shape.
Lies = tuple[str, tuple[int, ...], tuple[int, ...]]


class Moves(Axes):
    """Axes as `alignment` found them, by name."""

    def __init__(self, moves: Mapping[str, Lies]) -> None:
        self.moves = moves

    def to_flax(self, name: str, array: np.ndarray) -> np.ndarray:
        move, _, shape = self.moves[name]
        return alignment.to_flax(array, move, shape)

    def from_flax(self, name: str, array: np.ndarray) -> np.ndarray:
        move, shape, _ = self.moves[name]
        return alignment.to_torch(array, move, shape)


@dataclass(frozen=True)
class Intermediate:
    """What a layer gives on both sides: its name, where each has it, how its axes lie in Flax."""

    name: str
    torch: Place
    flax: Place
    lies: Lies


def align_layers(layers: list[LayerPair], torch: Trace, flax: Trace) -> tuple[Intermediate, ...]:
    """The outputs of paired layers that can be compared, in torch's order of execution."""
    theirs = {(c.name, c.index, path): x for c in flax.calls for path, x in c.outputs.items()}
    partner = {pair.torch: pair.flax for pair in layers if pair.torch}
    found = []
    for call in sorted(torch.calls, key=lambda c: c.end):
        for path, x in call.outputs.items():
            here, there = (
                (call.name, call.index, path),
                (partner.get(call.name, ""), call.index, path),
            )
            if call.name not in partner or there not in theirs or x.dtype.kind not in "fc":
                continue
            y = theirs[there]
            if alignment.moves(x.shape, y.shape):
                lies = (alignment.best_move(x, y), x.shape, y.shape)
                found.append(Intermediate(title(here), here, there, lies))
    return tuple(found)


def align_outputs(
    torch_trace: Trace,
    flax_trace: Trace,
    allowed: Collection[str],
    report: Report,
    pairs: Mapping[str, str],
) -> dict[str, Lies]:
    """How the axes of each of torch's paired outputs lie in Flax: as they are where the shapes are
    equal, or by an `allowed` move, which the inputs have made too. `pairs`: Flax's name -> torch's.
    """
    ours, theirs = _arrays(torch_trace), _arrays(flax_trace)
    moves: dict[str, Any] = {}
    for there, name in pairs.items():
        x, y = ours[name], theirs[there]
        if not alignment.moves(x.shape, y.shape):
            raise UsageError(
                f"{name} has shape {x.shape} in torch and {y.shape} in Flax",
                "let both return the same; axes may be in another order, sizes may not differ",
            )
        move = alignment.best_move(x, y, allowed)
        moves[name] = (move, x.shape, y.shape)
        told = f"{name}: torch's {x.shape} is compared with Flax's {y.shape}"
        if x.shape != y.shape and (move in allowed or (move == "channels" and x.ndim >= 4)):
            report.notices.append(told)  # as the frameworks have their images
        elif x.shape != y.shape:
            report.blind_spots.append(BlindSpot("fitted axes", (name,), f"{told}, by sizes alone"))
        elif move != "same":
            report.notices.append(f"{name}: axes are compared as those of the inputs ({move})")
        if spot := _ambiguous(name, x, y, move, allowed):
            report.blind_spots.append(spot)
    return moves


def _arrays(trace: Trace) -> dict[str, np.ndarray]:
    return {k: to_numpy(v) for k, v in named_outputs(trace.output).items()}


def _ambiguous(
    name: str, x: np.ndarray, y: np.ndarray, move: str, allowed: Collection[str]
) -> BlindSpot | None:
    """What is said of an output whose axes could lie otherwise, by its sizes or by its values."""
    tell = "inputs of other sizes would tell whether the axes are meant to be swapped"
    able = alignment.moves(x.shape, y.shape)
    if x.shape == y.shape:
        able = [m for m in able if m == "same" or m in allowed]
    if len(able) > 1:
        told = f"sizes do not tell how the axes of {x.shape} lie, the closest is taken ({move})"
    elif move == "same" and move not in alignment.likely_moves(x, y):
        told = f"{x.shape} is the same with two axes swapped, and is compared as it is"
    else:
        return None
    return BlindSpot("ambiguous axes", (name,), f"{name}: {told}; {tell}")


def align_inputs(
    torch: Mapping[str, str], flax: Mapping[str, str], pair: Pair
) -> tuple[dict[str, Lies], set[str]]:
    """How the axes of each input lie in Flax, and every move that they may have made. `torch` and
    `flax`: path in the call -> name."""
    ours = {torch[path]: x for path, x in pair.call.arrays().items()}
    theirs = pair.flax_call.arrays()
    moves: dict[str, Lies] = {}
    made: set[str] = set()
    for path, name in list(flax.items()):
        x, y = ours[name], theirs[path]
        if alignment.moves(x.shape, y.shape):
            moves[name] = (alignment.best_move(x, y), x.shape, y.shape)
            made |= alignment.likely_moves(x, y)
    return moves, made
