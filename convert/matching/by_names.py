"""Tensors of two checkpoints, paired by names and shapes alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from convert.matching.assignment import assign
from convert.matching.features import Alike, features
from convert.matching.groups import Shape, grouped
from convert.matching.units import Unit, able, fused

_LEAST = -4.0  # below it, names say that two are not one; a little below 0 they say nothing
_GIVEN = 100.0  # what the user says counts for more than any name
_ROUNDS = 2  # in which the modules around a tensor vote on where it belongs


@dataclass(frozen=True)
class Chosen:
    """A unit of torch's and one of Flax's that names say are one: how alike they are, and by how
    much the best assignment without this pair is worse. `rivals` are Flax's next best."""

    ours: Unit
    theirs: Unit
    score: float
    margin: float
    rivals: tuple[str, ...] = ()


def by_names(
    torch: Mapping[str, Shape], flax: Mapping[str, Shape], given: Mapping[str, str]
) -> tuple[list[Chosen], list[Unit], list[Unit]]:
    """The pairs that names and shapes of two headers tell, and the units left on either side.

    `given` are the user's own pairs of names, torch's to Flax's, with numbers or "#" for them.
    """
    ours, theirs = fused(_units(torch), _units(flax))
    fitting = [(i, j) for i, a in enumerate(ours) for j, b in enumerate(theirs) if able(a, b)]
    fitting = _as_given(ours, theirs, fitting, given)
    alike = Alike([u.features for u in ours], [u.features for u in theirs])
    scores = {
        (i, j): alike.score(ours[i].features, theirs[j].features)
        + _GIVEN * _is_given(ours[i], theirs[j], given)
        for i, j in fitting
    }
    found = assign({k: s - _LEAST for k, s in scores.items() if s > _LEAST})
    for _ in range(_ROUNDS):
        near = _Near(ours, theirs, found)
        better = {k: s + near(*k) for k, s in scores.items()}
        found = assign({k: s - _LEAST for k, s in better.items() if s > _LEAST})
    chosen = [
        Chosen(ours[i], theirs[j], better[i, j], margin, _rivals(i, j, better, theirs))
        for (i, j), margin in found.items()
    ]
    used = {i for i, _ in found}, {j for _, j in found}
    left = [
        [u for k, u in enumerate(side) if k not in taken]
        for side, taken in zip((ours, theirs), used, strict=True)
    ]
    return chosen, left[0], left[1]


def _is_given(ours: Unit, theirs: Unit, given: Mapping[str, str]) -> bool:
    names = called(theirs)
    return any(given.get(n) in names for n in called(ours))


def called(unit: Unit) -> frozenset[str]:
    """Every name that a user may call a unit by."""
    return unit.members.union(unit.names)


def _as_given(
    ours: Sequence[Unit],
    theirs: Sequence[Unit],
    fitting: list[tuple[int, int]],
    given: Mapping[str, str],
) -> list[tuple[int, int]]:
    """Without the pairs that what the user gave excludes."""
    fixed = [k for k in fitting if _is_given(ours[k[0]], theirs[k[1]], given)]
    rows, columns = {i for i, _ in fixed}, {j for _, j in fixed}
    return fixed + [k for k in fitting if k[0] not in rows and k[1] not in columns]


def _units(tensors: Mapping[str, Shape]) -> list[Unit]:
    groups = grouped(tensors)
    return [Unit((g,), f) for g, f in zip(groups, features(groups), strict=True)]


class _Near:
    """How well a pair agrees with where the others put the modules around it."""

    def __init__(
        self,
        ours: Sequence[Unit],
        theirs: Sequence[Unit],
        chosen: Mapping[tuple[int, int], float],
    ) -> None:
        self.sides = ours, theirs
        self.votes: dict[tuple[str, str], float] = defaultdict(float)
        for (i, j), margin in chosen.items():
            for a in _around(ours[i]):
                for b in _around(theirs[j]):
                    self.votes[a, b] += min(margin, 3.0)
        self.most: dict[str, float] = defaultdict(float)
        for (a, b), n in self.votes.items():
            self.most[f"<{a}"] = max(self.most[f"<{a}"], n)
            self.most[f">{b}"] = max(self.most[f">{b}"], n)

    def __call__(self, i: int, j: int) -> float:
        """Up to 2 for a pair whose owners belong together, below 0 where they belong elsewhere."""
        a, b = _around(self.sides[0][i])[:1], _around(self.sides[1][j])[:1]
        if not a or not b or not (self.most[f"<{a[0]}"] and self.most[f">{b[0]}"]):
            return 0.0
        n = self.votes[a[0], b[0]]
        return 2.0 * n / max(self.most[f"<{a[0]}"], self.most[f">{b[0]}"]) - 1.0


def _around(unit: Unit) -> list[str]:
    """The modules around a unit, the nearest first."""
    parts = unit.groups[0].parts[:-1]
    return [".".join(parts[:k]) for k in range(len(parts), 0, -1)]


def _rivals(
    i: int, j: int, scores: Mapping[tuple[int, int], float], theirs: Sequence[Unit]
) -> tuple[str, ...]:
    others = sorted(((s, k) for (r, k), s in scores.items() if r == i and k != j), reverse=True)
    return tuple(theirs[k].name for _, k in others[:3])
