"""What is matched as one: a group of tensors, or several that the other side holds as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from convert.matching.features import Features
from convert.matching.fits import ShapeFit, fits, without_ones
from convert.matching.groups import Index, Shape, TensorGroup

_FUSED = {"qkv": ("q", "k", "v"), "kv": ("k", "v"), "gateup": ("gate", "up")}


@dataclass(frozen=True)
class Unit:
    """One group; or the parts of a fused projection, in the order in which they are joined.

    `axis` is where parts of different sizes are joined; equal ones are stacked in front (None).
    """

    groups: tuple[TensorGroup, ...]
    features: Features
    axis: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of its groups."""
        return tuple(g.name for g in self.groups)

    @property
    def name(self) -> str:
        """For people."""
        return " + ".join(self.names)

    @cached_property
    def members(self) -> frozenset[str]:
        """The names of all its tensors."""
        return frozenset(n for g in self.groups for n in g.members.values())

    @cached_property
    def sizes(self) -> Shape | None:
        """How many layers each number counts, without those that count one."""
        sizes = self.groups[0].sizes
        return None if sizes is None else without_ones(sizes)

    @cached_property
    def shape(self) -> Shape | None:
        """Of one layer's tensor, its parts joined; None where layers differ."""
        shapes = [g.shape for g in self.groups]
        if any(s is None for s in shapes):
            return None
        return self._joined([s for s in shapes if s is not None])

    def shape_at(self, index: Index) -> Shape:
        """Of one layer's tensor, its parts joined."""
        return self._joined([g.shapes[index] for g in self.groups])

    def _joined(self, shapes: Sequence[Shape]) -> Shape:
        if len(shapes) == 1:
            return shapes[0]
        if self.axis is None:
            return (len(shapes), *shapes[0])
        k = self.axis
        return (*shapes[0][:k], sum(s[k] for s in shapes), *shapes[0][k + 1 :])

    def only(self, indices: Iterable[Index]) -> Unit:
        """The unit with these layers only."""
        kept = list(indices)
        groups = tuple(
            TensorGroup(g.parts, {i: g.members[i] for i in kept}, {i: g.shapes[i] for i in kept})
            for g in self.groups
        )
        return Unit(groups, self.features, self.axis)

    @property
    def count(self) -> int:
        """Number of layers."""
        return len(self.groups[0].members)

    @property
    def stacked(self) -> bool:
        """Whether its parts are stacked in front."""
        return len(self.groups) > 1 and self.axis is None


@dataclass(frozen=True)
class Way:
    """One way in which a unit of torch's may become one of Flax's.

    `each`: layer by layer, in order of their numbers, `fit` being of one layer's tensors. Otherwise
    `fit` is of whole stacks: the numbers of layers, then axes.
    """

    each: bool
    fit: ShapeFit


def aligned(a: Unit, b: Unit) -> list[tuple[Unit, Unit]]:
    """The pair as pairs within which every layer has the same shapes: itself, where it is so; else
    those layers together that have; or, where Flax stacks each stage, stage by stage."""
    if a.count == b.count:
        if a.shape is not None and b.shape is not None:
            return [(a, b)]
        classes: dict[tuple[Shape, Shape], list[tuple[Index, Index]]] = {}
        for i, j in zip(a.groups[0].indices, b.groups[0].indices, strict=True):
            classes.setdefault((a.shape_at(i), b.shape_at(j)), []).append((i, j))
        return [(a.only(i for i, _ in c), b.only(j for _, j in c)) for c in classes.values()]
    if a.sizes is not None and a.shape is not None and b.sizes is not None and b.shape is not None:
        return [(a, b)]
    depth = len(b.groups[0].indices[0])
    outer: dict[Index, list[Index]] = {}
    for i in a.groups[0].indices:
        outer.setdefault(i[:depth], []).append(i)
    if len(outer) != b.count:
        return []
    stages = zip(outer.values(), b.groups[0].indices, strict=True)
    return [(a.only(inner), b.only([j])) for inner, j in stages]


def ways(a: Unit, b: Unit) -> tuple[Way, ...]:
    """All ways that numbers of layers and shapes allow, of a pair that is aligned."""
    if a.count == b.count:
        if a.shape is None or b.shape is None:
            return ()
        found = fits(without_ones(a.shape), without_ones(b.shape))
        return tuple(Way(True, f) for f in found)
    if None in (a.sizes, b.sizes, a.shape, b.shape) or a.count % b.count:
        return ()
    assert a.sizes is not None
    assert b.sizes is not None
    assert a.shape is not None
    assert b.shape is not None
    ours, theirs = len(a.sizes), len(b.sizes)
    made = fits((*a.sizes, *without_ones(a.shape)), (*b.sizes, *without_ones(b.shape)))
    return tuple(Way(False, f) for f in made if _layers_apart(f, ours, theirs, b.stacked))


def _layers_apart(fit: ShapeFit, ours: int, theirs: int, stacked: bool) -> bool:
    """Whether Flax's numbers of layers, the first axes of its side, are torch's, the first of its
    own; and whether no layer is in one axis with features, and none is a part."""
    if fit.merged:
        return theirs == 0 and all(fit.axes.count(fit.axes[k]) == 1 for k in range(ours))
    parts = stacked and fit.axes[theirs] < ours
    return not parts and all(axis < ours for axis in fit.axes[:theirs])


def able(a: Unit, b: Unit) -> bool:
    """Whether torch's `a` may be Flax's `b` as far as numbers and shapes tell."""
    pairs = aligned(a, b)
    return bool(pairs) and all(ways(x, y) for x, y in pairs)


def fused(ours: list[Unit], theirs: list[Unit]) -> tuple[list[Unit], list[Unit]]:
    """Both sides with q, k and v (k and v; gate and up) as one where the other has them as one."""
    return _joined(ours, theirs), _joined(theirs, ours)


def _joined(units: list[Unit], others: list[Unit]) -> list[Unit]:
    for word, parts in _FUSED.items():
        wholes = [u for u in others if u.features.classes.get("proj") == word]
        taken: set[int] = set()
        for members in _families(units, parts):
            made = _one([units[i] for i in members], word)
            if made is not None and any(able(made, w) or able(w, made) for w in wholes):
                units = [*units, made]
                taken |= set(members)
        units = [u for i, u in enumerate(units) if i not in taken]
    return units


def _families(units: Sequence[Unit], parts: tuple[str, ...]) -> list[list[int]]:
    """Indices of units that are these parts of one projection: alike but for it."""
    found: dict[object, dict[str, int]] = {}
    for i, u in enumerate(units):
        f = u.features
        word = f.classes.get("proj")
        if len(u.groups) == 1 and word in parts and "norm" not in f.meanings:
            rest = frozenset((k, v) for k, v in f.classes.items() if k not in ("proj", "number"))
            key = (rest, f.said.role, u.groups[0].block, len(u.groups[0].parts), u.count,
                   f.meanings)  # fmt: skip
            found.setdefault(key, {}).setdefault(word, i)
    return [[f[p] for p in parts] for f in found.values() if len(f) == len(parts)]


def _one(units: list[Unit], word: str) -> Unit | None:
    groups = tuple(u.groups[0] for u in units)
    classes = units[0].features.classes | {"proj": word}
    told = replace(units[0].features, classes=classes)
    shapes = [g.shape for g in groups]
    if any(s is None for s in shapes) or len({len(s) for s in shapes if s is not None}) != 1:
        return None
    if len(set(shapes)) == 1:
        return Unit(groups, told)
    differing = [k for k, n in enumerate(zip(*shapes, strict=True)) if len(set(n)) > 1]
    return Unit(groups, told, differing[0]) if len(differing) == 1 else None
