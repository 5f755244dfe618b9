"""How alike two groups of tensors are by what their names say, and what stands around them."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from convert.matching.groups import TensorGroup
from convert.matching.vocabulary import Said, meanings, said

_NO_CLASS = 1.0
# What the same, and what another, value of a class is worth; a value on one side only costs little.
_SAME, _OTHER, _ALONE = 3.0, -3.0, -0.4
_WEIGHTS = {"proj": 1.6, "table": 1.3, "side": 1.2, "tower": 1.2, "rank": 1.6, "place": 0.8,
            "number": 0.7}  # fmt: skip
_PLAIN = {"attn": 1.2, "mlp": 1.0, "norm": 1.6, "cross": 1.6, "self": 0.3, "head": 1.4,
          "embed": 1.0, "patch": 1.2, "pooler": 1.4, "router": 1.6, "depthwise": 1.2,
          "downsample": 1.4}  # fmt: skip


@dataclass(frozen=True)
class Features:
    """What the name of a group says, and its place among those around it."""

    said: Said
    meanings: frozenset[str]
    classes: dict[str, str] = field(hash=False)  # class -> value


def features(groups: Sequence[TensorGroup]) -> list[Features]:
    """Of each group."""
    told = [said(p for p in _bare(g)) for g in groups]
    made = [_with_context(s) for s in told]
    return _ranked(groups, _numbered_attention(groups, made))


def _numbered_attention(groups: Sequence[TensorGroup], made: list[Features]) -> list[Features]:
    """Attention_0 and Attention_1 of one layer: what it attends to itself with is called first."""
    found = []
    by_number: dict[tuple[object, ...], set[tuple[int, ...]]] = defaultdict(set)
    stems = []
    for g in groups:
        at = next(
            (k for k, p in enumerate(g.parts) if "attn" in meanings(p)[0] and meanings(p)[2]), None
        )
        stem = None if at is None else (*g.parts[:at], g.parts[at].rstrip("0123456789"))
        stems.append((stem, meanings(g.parts[at])[2] if at is not None else ()))
        if stem is not None:
            by_number[stem].add(stems[-1][1])
    for f, (stem, number) in zip(made, stems, strict=True):
        if stem is not None and len(by_number[stem]) == 2:
            later = number == max(by_number[stem])
            f = replace(f, meanings=f.meanings | {"cross" if later else "self"})
        found.append(f)
    return found


def _bare(group: TensorGroup) -> Iterable[str]:
    return (p.replace("#", "") for p in group.parts)


def _with_context(s: Said) -> Features:
    """Meanings that follow from others: the output of an MLP is its way down."""
    found = set(s.meanings)
    if "moe" in found:
        found.add("mlp")
    if "proj:gate" in found and "router" in found:
        found.discard("proj:gate")
    if "proj:o" in found and "attn" not in found and "norm" not in found:
        found.discard("proj:o")
        found.add("proj:down")
    if "norm" in found:  # output.LayerNorm: which layer it follows, not what it projects to
        for m in ("proj:o", "proj:up", "proj:down"):
            if m in found:
                found.discard(m)
                found.add("place:post")
    classes = {m.partition(":")[0]: m.partition(":")[2] for m in found if ":" in m}
    return Features(s, frozenset(m for m in found if ":" not in m), classes)


def _ranked(groups: Sequence[TensorGroup], made: list[Features]) -> list[Features]:
    """With the place of each norm among those of its block, and of each number among its like."""
    by_block: dict[tuple[object, ...], list[int]] = defaultdict(list)
    by_number: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, (g, f) in enumerate(zip(groups, made, strict=True)):
        kind = (
            "layerscale" if "layerscale" in f.meanings else "norm" if "norm" in f.meanings else ""
        )
        if kind and "proj" not in f.classes:
            around = g.block if "#" in g.name else _tower(f)
            by_block[around, kind, f.said.role, len(next(iter(g.shapes.values())))].append(i)
        if f.said.numbers:
            stem = tuple("".join(c for c in p if not c.isdigit()) for p in g.parts)
            by_number[g.block, stem].append(i)
    for members in by_block.values():
        keys = [_place(made[i]) for i in members]
        if len(members) > 1 and len(set(keys)) == len(keys):
            for rank, k in enumerate(sorted(range(len(keys)), key=keys.__getitem__)):
                i = members[k]
                value = f"{rank}/{len(members)}"
                made[i] = replace(made[i], classes=made[i].classes | {"rank": value})
    for members in by_number.values():
        numbers = [made[i].said.numbers for i in members]
        if len(members) > 1 and len(set(numbers)) == len(numbers):
            for rank, k in enumerate(sorted(range(len(numbers)), key=numbers.__getitem__)):
                i = members[k]
                classes = dict(made[i].classes)
                if "mlp" in made[i].meanings and len(members) == 2 and "proj" not in classes:
                    classes["proj"] = ("up", "down")[rank]
                elif "rank" not in classes:
                    classes["number"] = f"{rank}/{len(members)}"
                made[i] = replace(made[i], classes=classes)
    return made


def _tower(f: Features) -> tuple[str, ...]:
    """What is around a layer whose name has no number: where layers are stacked, all their norms
    have an axis more than others."""
    return tuple(f.classes.get(c, "") for c in ("side", "tower"))


def _place(f: Features) -> tuple[float, ...]:
    """Where in a block a norm stands, as far as its name says."""
    after = {"pre": -1.0, "post": 1.0}.get(f.classes.get("place", ""), 0.0)
    at = 0.0
    if "cross" in f.meanings:
        at = 10.0
    elif "mlp" in f.meanings:
        at = 20.0
    elif "attn" not in f.meanings:
        at = {-1.0: -10.0, 0.0: 15.0, 1.0: 30.0}[after]
        if f.said.numbers:
            at = float(f.said.numbers[-1])
            return (at,)
    if "final" in f.meanings:
        at = 40.0
    return (at + 2 * after, *map(float, f.said.numbers))


class Alike:
    """Scores pairs of groups; rare words and meanings count more than common ones."""

    def __init__(self, ours: Sequence[Features], theirs: Sequence[Features]) -> None:
        self.sides = (ours, theirs)
        self.counts = [
            Counter(w for f in side for w in f.said.words | f.meanings) for side in self.sides
        ]

    def rarity(self, word: str) -> float:
        """1 for what one group alone says on either side, towards 0 for what all say."""
        shares = [c[word] / max(1, len(s)) for c, s in zip(self.counts, self.sides, strict=True)]
        most = max(shares)
        return max(0.1, 1 - math.sqrt(most)) if most else 1.0

    def score(self, a: Features, b: Features) -> float:
        """How alike; above 0 where the names speak for the pair."""
        total = 2.0 if a.said.role == b.said.role else -5.0
        for key in {*a.classes, *b.classes}:
            x, y = a.classes.get(key), b.classes.get(key)
            if key == "place" and "rank" in a.classes and "rank" in b.classes:
                continue  # "post_attention" here is "pre_mlp" there
            worth = _ALONE if x is None or y is None else _SAME if x == y else _OTHER
            total += worth * _WEIGHTS.get(key, _NO_CLASS)
        for m in a.meanings | b.meanings:
            weight = _PLAIN.get(m, 1.0)
            if m in a.meanings and m in b.meanings:
                total += weight * (0.5 + self.rarity(m))
            else:
                total -= weight * 0.7
        for w in a.said.words & b.said.words:
            total += 1.5 * self.rarity(w)
        total -= 0.25 * len(a.said.words ^ b.said.words)
        if a.said.words == b.said.words and a.meanings == b.meanings and a.classes == b.classes:
            total += 1.0
        return total
