"""What names and values leave: ties, constants, and what is alone on either side."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from convert.matching.by_values import Values, pairs_by_print
from convert.matching.evidence import Found, believed
from convert.matching.features import Alike
from convert.matching.groups import TensorGroup
from convert.matching.holding import MatchSide
from convert.matching.orientation import UnitPair, choose
from convert.matching.rearranged import match_values
from convert.matching.unit_entries import entries
from convert.matching.units import Unit, able, ways
from zoo.containers import dtypes
from zoo.layout import Constant, Entry, Tensor

# Buffers that transformers, torchvision and timm save, and that Flax's code makes itself.
_BUFFERS = re.compile(
    r"(^|\.)(position_ids|token_type_ids|inv_freq|original_inv_freq|num_batches_tracked"
    r"|masked_bias|final_logits_bias|cos_cached|sin_cached|freqs_cis|attn_mask|causal_mask"
    r"|relative_position_index|relative_coords_table|masked_spec_embed)$"
)
_FEW = 200, 1 << 26  # tensors, and elements, up to which each is looked for in every other


def looked_up(values: Values, ours: list[Unit], theirs: list[Unit]) -> Iterator[Found]:
    """Entries for units of equal values; then for single tensors, then for parts of tensors."""
    for singly in (False, True):
        sides = [single(u) if singly else u for u in (ours, theirs)]
        for a, b in list(pairs_by_print(values, *sides)):
            made = values.fitting(a, b, []) if able(a, b) else None
            if made is not None:
                yield believed(made, a.names, b.names, "values", "values", checked="values")
                for side, unit in ((ours, a), (theirs, b)):
                    _without(side, unit)
    yield from _in_parts(values, ours, theirs)


def _in_parts(values: Values, ours: list[Unit], theirs: list[Unit]) -> Iterator[Found]:
    """Tensors that hold several others, wherever these stand."""
    held = []
    for side, units in enumerate((ours, theirs)):
        infos = [(n, s) for u in units for g in u.groups for n, s in
                 zip(g.members.values(), g.shapes.values(), strict=True)]  # fmt: skip
        if len(infos) > _FEW[0] or sum(int(np.prod(s)) for _, s in infos) > _FEW[1]:
            return
        held.append({n: values.read[side](n) for n, _ in infos})
    for m in match_values(*held):
        entry = Entry(
            "param",
            tuple(Tensor(n, held[0][n].shape) for n in m.torch),
            tuple(Tensor(n, held[1][n].shape) for n in m.flax),
            m.ops,
        )
        if values.equal(entry):
            yield believed([entry], m.torch, m.flax, "values", "values", checked="values")


def single(units: Sequence[Unit]) -> list[Unit]:
    """Every tensor as a unit of its own."""
    return [
        Unit((TensorGroup(tuple(n.split(".")), {(): n}, {(): g.shapes[i]}),), u.features)
        for u in units for g in u.groups for i, n in g.members.items()
    ]  # fmt: skip


def _without(units: list[Unit], unit: Unit) -> None:
    """Takes a unit, or the unit that a single tensor is of, out."""
    kept = []
    for u in units:
        if not u.members & unit.members:
            kept.append(u)
        elif u.members - unit.members:
            kept += [s for s in single([u]) if not s.members & unit.members]
    units[:] = kept


def eliminated(ours: list[Unit], theirs: list[Unit], same: bool) -> Iterator[Found]:
    """A unit that can be one other only, and that other only it: nothing else is left.

    Where both sides hold the same weights and these two differ, they are not one.
    """
    if same:
        return
    fitting = [(a, b) for a in ours for b in theirs if able(a, b)]
    alike = Alike([u.features for u in ours], [u.features for u in theirs])
    for a, b in fitting:
        alone = sum(x is a for x, _ in fitting) == sum(y is b for _, y in fitting) == 1
        if not alone or a.count != b.count or a.shape is None or b.shape is None:
            continue
        score = alike.score(a.features, b.features)
        classes = set(a.features.classes.items()) ^ set(b.features.classes.items())
        if a.features.said.role != b.features.said.role or len({k for k, _ in classes}) < len(
            classes
        ):
            continue  # names say that they are two
        ((way, why),) = choose([UnitPair(a, b, ways(a, b))], [])
        if way is None:
            continue
        made = list(entries(a, b, way))
        yield believed(made, a.names, b.names, "elimination", why, score=round(score, 2))


def constants(
    side: MatchSide, left: Sequence[str], done: set[str], given: Mapping[str, str]
) -> tuple[dict[str, Constant], dict[str, str]]:
    """Of torch's tensors that Flax does not have: those whose values the way back can make again,
    or that the user said Flax lacks; and those that repeat a tensor that has been matched."""
    found: dict[str, Constant] = {}
    ties: dict[str, str] = {}
    for name in left:
        info = side.tensors[name]
        absent = name in given and not given[name]
        integer = not dtypes.is_float(info.dtype) and not info.dtype.startswith("C")
        if absent or name in side.buffers or _BUFFERS.search(name) or integer:
            fill = "arange" if name.endswith("position_ids") and info.shape else "zeros"
            found[name] = Constant(fill, info.dtype, True)  # type: ignore[arg-type]
            continue
        twin = _repeats(side, name, done)
        if twin is not None:
            ties[name] = twin
    return found, ties


def _repeats(side: MatchSide, name: str, done: set[str]) -> str | None:
    """A matched tensor of the same values."""
    info = side.tensors[name]
    able_ = [n for n in done if side.tensors[n] == info]
    mine = side.read(name).tobytes() if able_ else b""
    return next((n for n in able_ if side.read(n).tobytes() == mine), None)


def surplus(side: MatchSide, free: Sequence[str]) -> list[str]:
    """Flax's tensors that are no weights: counters, keys."""
    return [n for n in free if not dtypes.is_float(side.tensors[n].dtype)
            and not side.tensors[n].dtype.startswith("C")]  # fmt: skip
