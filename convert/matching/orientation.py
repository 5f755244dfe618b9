"""Which of the ways that sizes allow: conventions of names, and the vote of those that have one.

A square matrix may be transposed or not. Rectangular ones under the same name in the same
checkpoint tell; where there are none, only names that mean one thing everywhere do (`kernel`).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from convert.matching.fits import without_ones
from convert.matching.units import Unit, Way

# What a leaf's name means in every codebase: outputs last, rows (of a table, of torch's) first.
_MEANS = {"kernel": "last", "embedding": "first"}
_SPLIT_OUT = frozenset(["q", "k", "v", "qkv", "kv"])


Voter = tuple[str, int, bool]


@dataclass(frozen=True)
class UnitPair:
    """A unit of torch's and one of Flax's, and all ways between them."""

    ours: Unit
    theirs: Unit
    ways: tuple[Way, ...]


@dataclass(frozen=True)
class AxesStyle:
    """What is voted on: where the outputs' axis lies, and at which place layers are stacked."""

    outputs: str  # "first", "last", "between", "" where there is none
    stack: tuple[int, ...]


def labels(unit: Unit, transposed: bool) -> str:
    """What each axis of torch's unit is: n a number of layers, p a part, o outputs, i inputs, s of
    a kernel, e an expert, a any other; without axes of length one."""
    group = unit.groups[0]
    shape = group.shape or next(iter(group.shapes.values()))
    said = unit.features.said
    inner = "a" * len(shape)
    if (said.role == "main" and group.parts[-1] in ("weight", "kernel")) or len(shape) == 1:
        inner = {1: "o", 2: "io" if transposed else "oi", 3: "ois", 4: "oiss", 5: "oisss"}.get(
            len(shape), inner
        )
    if len(shape) == 3 and "moe" in unit.features.meanings:
        inner = "eoi"
    if unit.stacked:
        inner, shape = "p" + inner, (len(unit.groups), *shape)
    return "".join(c for c, n in zip(inner, shape, strict=True) if n != 1)


def style(pair: UnitPair, way: Way, axes: str) -> AxesStyle:
    """The style of a way; `axes` are the labels of torch's axes, without numbers of layers."""
    numbers = 0 if way.each else len(pair.ours.sizes or ())
    skipped = 0 if way.each else len(pair.theirs.sizes or ())
    every = "n" * numbers + axes
    if way.fit.merged:
        places = list(zip(every, way.fit.axes, strict=True))
    else:
        places = [(every[a], k) for k, a in enumerate(way.fit.axes[skipped:])]
    stack = tuple(k for c, k in places if c == "n")
    outs = [k for c, k in places if c == "o"]
    ins = [k for c, k in places if c in "is"]
    if not outs or not ins:
        return AxesStyle("", stack)
    where = "last" if min(outs) > max(ins) else "first" if max(outs) < min(ins) else "between"
    return AxesStyle(where, stack)


def choose(pairs: Sequence[UnitPair], transposed: Iterable[str]) -> list[tuple[Way | None, str]]:
    """Of each pair the way, and why: None where nothing tells."""
    kept = frozenset(transposed)
    told = [labels(p.ours, p.ours.name in kept) for p in pairs]
    styles = [[style(p, w, axes) for w in p.ways] for p, axes in zip(pairs, told, strict=True)]
    able = [_sensible(p, axes) for p, axes in zip(pairs, told, strict=True)]
    votes: Counter[tuple[Voter, str]] = Counter()
    stacks: Counter[tuple[int, ...]] = Counter()
    for p, made, ways in zip(pairs, styles, able, strict=True):
        found = {made[k].outputs for k in ways} - {""}
        if len(found) == 1:
            votes[_voter(p), found.pop()] += 1
        places = {made[k].stack for k in ways}
        if len(places) == 1:
            stacks[places.pop()] += 1
    chosen = [
        _chosen(p, made, ways, votes, stacks)
        for p, made, ways in zip(pairs, styles, able, strict=True)
    ]
    return [
        (way and _by_heads(p, way, axes), why)
        for p, axes, (way, why) in zip(pairs, told, chosen, strict=True)
    ]


def _by_heads(p: UnitPair, way: Way, axes: str) -> Way | None:
    """The way with q, k and v inside each head, as a `query_key_value` of torch's has them; None
    where Flax's shape does not tell how many heads there are."""
    if p.ours.features.classes.get("proj") != "qkv" or p.theirs.features.classes["proj"] != "qkv":
        return way
    if "query_key_value" not in p.ours.groups[0].parts:
        return way
    numbers = 0 if way.each else len(p.ours.sizes or ())
    skipped = 0 if way.each else len(p.theirs.sizes or ())
    out = numbers + axes.index("o")
    factors = [k for k in range(skipped, len(way.fit.axes)) if way.fit.axes[k] == out]
    if way.fit.merged or len(factors) < 3:
        alike = p.theirs.groups[0].parts[-2:-1] == ("query_key_value",)
        return way if alike and len(factors) == 1 else None
    target = (*((3,) if p.theirs.stacked else ()), *without_ones(p.theirs.groups[0].shape or ()))
    three = [k for k in factors if target[k - skipped] == 3]
    if p.theirs.stacked:
        three = [skipped]
    if len(three) != 1:
        return None
    return replace(way, fit=replace(way.fit, inner=three[0]))


def _leaf(p: UnitPair) -> str:
    return p.theirs.groups[0].parts[-1]


def _voter(p: UnitPair) -> Voter:
    """Who votes alike: tensors of one leaf's name and as many axes, tables apart."""
    axes = len(next(iter(p.ours.groups[0].shapes.values())))
    return _leaf(p), axes, "table" in p.ours.features.classes


def _chosen(
    p: UnitPair,
    styles: list[AxesStyle],
    able: list[int],
    votes: Counter[tuple[Voter, str]],
    stacks: Counter[tuple[int, ...]],
) -> tuple[Way | None, str]:
    if len(able) == 1:
        return p.ways[able[0]], "shape"
    why = "shape"
    places = {styles[k].stack for k in able}
    if len(places) > 1:
        best = max(places, key=lambda s: (stacks[s], [-n for n in s]))
        if sum(stacks[s] == stacks[best] for s in places) > 1 and stacks[best]:
            return None, "open"
        able = [k for k in able if styles[k].stack == best]
        why = "stack" if stacks[best] else "convention"  # in front, where no tensor tells
    orders = {styles[k].outputs for k in able}
    if len(orders) > 1:
        leaf = _leaf(p)
        voted = {o: votes[_voter(p), o] for o in orders}
        most = max(voted.values())
        if most and sum(v > 0 for v in voted.values()) == 1:
            best_order, why = max(voted, key=lambda o: voted[o]), "vote"
        elif not most and _MEANS.get(leaf) in orders:
            best_order, why = _MEANS[leaf], "convention"
        else:
            return None, "open"
        able = [k for k in able if styles[k].outputs == best_order]
    return (p.ways[able[0]], why) if len(able) == 1 else (None, "open")


def _sensible(p: UnitPair, axes: str) -> list[int]:
    """Indices of the ways that no convention rules out, the fewest oddities only."""
    costs = [_oddity(p, w, axes) for w in p.ways]
    return [k for k, c in enumerate(costs) if c == min(costs)]


def _oddity(p: UnitPair, way: Way, axes: str) -> int:
    """What nobody does: kernels with rows and columns exchanged, heads that are split from inputs
    where they are of outputs, factors of one axis far apart."""
    numbers = 0 if way.each else len(p.ours.sizes or ())
    all_axes = "n" * numbers + axes
    if way.fit.merged:  # parts of a projection are joined along its outputs
        place = dict(zip(all_axes, way.fit.axes, strict=True))
        return 6 * ("p" in place and "o" in place and place["p"] != place["o"])
    named = [all_axes[k] for k in way.fit.axes]
    cost = 0
    spatial = [k for k in way.fit.axes if all_axes[k] == "s"]
    cost += 4 * (spatial != sorted(spatial))
    ends = [k for k, c in enumerate(named) if c in "oi"]
    cost += 2 * (bool(spatial) and len(ends) == 2 and ends[1] - ends[0] > 1)  # hwio, oihw
    stacked = [k for k in way.fit.axes if all_axes[k] == "n"]
    cost += 4 * (stacked != sorted(stacked))
    for axis in set(way.fit.axes):
        at = [k for k, a in enumerate(way.fit.axes) if a == axis]
        if len(at) > 1:
            if all_axes[axis] == "n":
                cost += 1
                continue
            between = [a for a in way.fit.axes[at[0] : at[-1]] if all_axes[a] not in "np"]
            cost += len(between) + 1 - len(at)
            if all_axes[axis] == "s":
                cost += 8
            proj = p.ours.features.classes.get("proj")
            if proj in _SPLIT_OUT and all_axes[axis] == "i":
                cost += 6
            if proj == "o" and all_axes[axis] == "o":
                cost += 6
    if "a" in axes:  # nothing is known of such axes: they stay in order
        plain = [k for k in way.fit.axes if all_axes[k] in "a"]
        cost += 2 * sum(x > y for x, y in itertools.pairwise(plain))
    if "e" in named:
        cost += 2 * (named.index("e") > min(named.index(c) for c in "oi" if c in named))
    return cost


def transposed_weights(units: Sequence[Unit]) -> list[str]:
    """Names of torch units whose matrices are (in, out): those of GPT-2's Conv1D, which a `c_fc`
    or `c_attn` that has more columns than rows tells."""

    def conv1d(u: Unit) -> bool:
        return any(p.startswith("c_") for p in u.groups[0].parts[-2:-1])

    told = [
        g.shape[1] > g.shape[0]
        for u in units
        for g in u.groups
        if g.parts[-2:-1] in (("c_fc",), ("c_attn",))
        and g.shape
        and len(without_ones(g.shape)) == 2
    ]
    return [u.name for u in units if conv1d(u)] if told and all(told) else []
