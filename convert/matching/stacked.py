"""Matches of single layers as those of the stack in which Flax holds them, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from convert.matching.pair import Match
from zoo.layout.ops import Flip, Op, Ops, Permute, Stack, Unstack


def restacked(found: Iterable[Match], stacks: Mapping[str, int]) -> Iterator[Match]:
    """The matches, with `layers.0.kernel`, `layers.1.kernel`, ... as the one tensor
    `layers.kernel` that has its layers along the first axis. A stack is matched whole, or not."""
    whole: dict[tuple[tuple[str, ...], Ops], dict[int, Match]] = {}
    for match in found:
        stack = next((s for s in stacks if match.flax[0].startswith(f"{s}.")), None)
        if stack is None:
            yield match
            continue
        index = int(match.flax[0].removeprefix(f"{stack}.").partition(".")[0])
        names = tuple(n.replace(f"{stack}.{index}.", f"{stack}.", 1) for n in match.flax)
        whole.setdefault((names, match.ops), {})[index] = match
    for (names, ops), layers in whole.items():
        count = next(n for s, n in stacks.items() if names[0].startswith(f"{s}."))
        if sorted(layers) != list(range(count)) or any(isinstance(op, Stack) for op in ops):
            continue
        torch = tuple(n for i in range(count) for n in layers[i].torch)
        along = Stack(0, len(layers[0].torch))
        yield Match(torch, names, (along, *(_moved(op, 1) for op in ops)), layers[0].kind)


def in_stacks(
    some: Mapping[str, np.ndarray], every: Mapping[str, Any], stacks: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Values of single layers as those of the stacks, the other layers as `every` has them."""
    made: dict[str, np.ndarray] = {}
    for name, value in some.items():
        stack = next((s for s in stacks if name.startswith(f"{s}.")), None)
        if stack is None:
            made[name] = value
            continue
        index, _, rest = name.removeprefix(f"{stack}.").partition(".")
        whole = made.setdefault(f"{stack}.{rest}", np.array(every[f"{stack}.{rest}"]))
        whole[int(index)] = value
    return made


def layer_by_layer(match: Match) -> Iterator[tuple[Match, int | None]]:
    """The matches of the single layers, whose Flax names end in their index, and that index; a
    match of no stack as it is."""
    if not match.ops or not isinstance(match.ops[0], Stack) or match.ops[0].axis:
        yield match, None
        return
    width = match.ops[0].groups
    if any(isinstance(op, Unstack) for op in match.ops) or not all(
        _lifted(o) for o in match.ops[1:]
    ):
        yield match, None
        return
    ops = tuple(_moved(op, -1) for op in match.ops[1:])
    for i in range(len(match.torch) // width):
        torch = match.torch[i * width : (i + 1) * width]
        yield Match(torch, tuple(f"{n}[{i}]" for n in match.flax), ops, match.kind), i


def _lifted(op: Op) -> bool:
    """Whether an op leaves the first axis alone."""
    if isinstance(op, Permute):
        return op.axes[0] == 0
    return 0 not in op.axes if isinstance(op, Flip) else getattr(op, "axis", 0) > 0


def _moved(op: Op, by: int) -> Op:
    """The op for arrays with one axis more in front (by=1), or without it (by=-1)."""
    if isinstance(op, Permute):
        axes = (0, *(a + 1 for a in op.axes)) if by > 0 else tuple(a - 1 for a in op.axes[1:])
        return Permute(axes)
    if isinstance(op, Flip):
        return Flip(tuple(a + by for a in op.axes))
    return dataclasses.replace(op, axis=op.axis + by)  # type: ignore[type-var,attr-defined]
