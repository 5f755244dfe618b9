"""Every paired leaf layer judged by itself: fed torch's own inputs, in float64.

What is computed in float32 somewhere makes everything after it float32's, and a small difference
of a layer behind it cannot be told from rounding. A layer by itself has nothing before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from convert.compare.flax_side import FlaxSide
from convert.compare.sides import title
from convert.compare.torch_side import TorchSide
from convert.judge.noise import EXACT, MARGIN, RERUNS, largest, statistics
from convert.judge.rows import FLOOR, Row
from convert.matching.alignment import Aligned, align, gap, to_flax, to_torch
from convert.matching.pair import LayerPair
from convert.runtime.precision import precision_of
from convert.runtime.torch_calls import again, record_narrow
from convert.runtime.torch_module import replica, shake
from convert.runtime.trace import Recorded, Trace
from zoo.layout.kinds import flax_kind, torch_kind

DIVIDED = "the outputs agree: the two layers only end at different places"


_NEAR = 2.0**-10  # of the scale: inputs as far apart as that are one another's


@dataclass(frozen=True)
class LeafCall:
    """One call of a pair of layers that holds no other pair. `met`: the whole run gave both the
    same inputs, but for rounding. `known`: so it did, and both frameworks have this kind of layer:
    it ends at the same place."""

    pair: LayerPair
    index: int
    inputs: tuple[tuple[Aligned, tuple[int, ...]], ...]  # each with its shape in Flax
    outputs: tuple[Aligned, ...]
    met: bool
    known: bool = False

    @property
    def key(self) -> tuple[str, int]:
        """Which of torch's calls it is."""
        return self.pair.torch, self.index


def leaves_of(
    pairs: list[LayerPair], torch_side: TorchSide, modules: Mapping[str, object], torch: Trace,
    flax: Trace,
) -> list[LeafCall]:  # fmt: skip
    """The leaves in torch's order of execution. `modules` are Flax's by path."""
    names = [p.torch for p in pairs]
    holding = {n for n in names if any(m != n and m.startswith(f"{n}.") for m in names)} | {""}
    partner = {p.torch: p for p in pairs if p.torch not in holding}
    theirs = flax.by_key()
    ours = dict(torch_side.module.named_modules())
    found = []
    for call in sorted(torch.calls, key=lambda c: c.end):
        pair = partner.get(call.name)
        other = theirs.get((pair.flax, call.index)) if pair else None
        if pair is not None and other is not None and other.end >= 0:
            kinds = torch_kind(ours[call.name]), flax_kind(modules[pair.flax])
            leaf = _leaf(pair, call, other, "embedding" in kinds)
            if leaf is not None:
                known = "other" not in kinds and not list(ours[call.name].children())
                known = known or ("other" not in kinds and "attention" in kinds)
                known = known and leaf.met
                found.append(dataclasses.replace(leaf, known=known))
    return found


def _leaf(pair: LayerPair, ours: Recorded, theirs: Recorded, looks_up: bool) -> LeafCall | None:
    """None where no input, or no output, of the two can be the same."""
    wanted = "fciu" if looks_up else "fc"
    inputs = tuple(
        (a, theirs.inputs[a.flax].shape)
        for a in align(ours.inputs, theirs.inputs)
        if ours.inputs[a.torch].dtype.kind in wanted
    )
    outputs = tuple(
        a for a in align(ours.outputs, theirs.outputs) if ours.outputs[a.torch].dtype.kind in "fc"
    )
    met = all(
        gap(to_flax(ours.inputs[a.torch], a.move, shape), theirs.inputs[a.flax])
        <= _NEAR * largest(theirs.inputs[a.flax])
        for a, shape in inputs
    )
    return LeafCall(pair, ours.index, inputs, outputs, met) if inputs and outputs else None


def judge_leaves(
    leaves: list[LeafCall], torch_side: TorchSide, flax_side: FlaxSide, outputs: list[Row]
) -> list[Row]:  # fmt: skip
    """A row for each output of each leaf; `outputs` are the rows of the whole run.

    `error` is that of float64, `noise` is measured where float64 alone does not make them the same.
    To be called inside `full_precision`; raises what torch raises in float64.
    """
    with precision_of("float64"):
        module = replica(torch_side.module, "float64")
        trace, narrow = record_narrow(module, torch_side.call)
        calls = trace.by_key()
        able = [leaf for leaf in leaves if leaf.key in calls]
        inputs = {
            (leaf.pair.flax, leaf.index): {
                a.flax: to_flax(calls[leaf.key].inputs[a.torch], a.move, shape)
                for a, shape in leaf.inputs
            }
            for leaf in able
        }
        made, narrow_flax = flax_side.alone(inputs)
        rows = []
        for leaf in able:
            for a in leaf.outputs:
                place = leaf.pair.flax, leaf.index, a.flax
                if place not in made:
                    continue
                call = calls[leaf.key]
                right = call.outputs[a.torch]
                given = to_torch(made[place], a.move, right.shape)
                why = narrow.get(leaf.key) or narrow_flax.get(place)
                noise = partial(_noise, torch_side, call, a.torch, why is not None)
                rows.append(_row(title((*leaf.key, a.torch)), right, given, why, noise))
    return _decided(rows, leaves, outputs)


def _row(
    name: str, right: np.ndarray, given: np.ndarray, why: str | None, noise: Callable[[], float]
) -> Row:
    error, scale = gap(right, given), largest(right)
    same, rounding = error <= EXACT * scale, 0.0
    if not same and np.isfinite(error):
        rounding = noise()
        same = error <= MARGIN * max(rounding, FLOOR * scale if why else 0.0)
    return Row(
        name, tuple(right.shape), error, rounding, scale, error, same,
        note=f"in float32 only: {why}" if why else "",
        statistics=statistics(right, given, scale),
    )  # fmt: skip


def _noise(side: TorchSide, call: Recorded, key: str, narrow: bool) -> float:
    """How far one unit in the last place of what the layer holds moves its output: of float64, of
    float32 for what Flax may hold combined; and, where it computes in float32, its rounding."""
    part = dict(side.module.named_modules())[call.name]
    right = call.outputs[key]
    names = {id(p): n for n, p in side.module.named_parameters()}
    rough = [n for n, p in part.named_parameters() if names[id(p)] in side.combined]
    apart = []
    for i in range(RERUNS):
        moved = replica(part, "float64")
        shake(moved, i, rough)
        apart.append(gap(right, again(moved, call)[key]))
    if narrow:
        apart.append(gap(right, again(replica(part, "float32"), call, "float32")[key]))
    return max(apart)


def _decided(rows: list[Row], leaves: list[LeafCall], outputs: list[Row]) -> list[Row]:
    """Two layers of somebody's own that differ by themselves, while all outputs agree, may only
    end at different places: they are judged where the whole run saw them agree in float32, and for
    the same inputs (an image may be flattened in another order)."""
    whole = [r for r in outputs if r.name == "output" or r.name.startswith("output.")]
    if not whole or not all(r.same for r in whole):
        return rows
    agreed = {r.name for r in outputs if r.error <= MARGIN * max(r.noise, FLOOR * r.scale)}

    def named(some: Iterable[LeafCall]) -> set[str]:
        return {title((*leaf.key, a.torch)) for leaf in some for a in leaf.outputs}

    known, met = named(x for x in leaves if x.known), named(x for x in leaves if x.met)
    return [
        r if r.same or r.name in known | (agreed & met) else dataclasses.replace(
            r, judged=False, note=DIVIDED)
        for r in rows
    ]  # fmt: skip
