"""Tensors in groups: what stands in every layer of a stack is one group, with its numbers apart.

`h.0.attn.wq`, `h.1.attn.wq`, ... are the group `h.#.attn.wq` with the indices (0,), (1,), .... A
checkpoint of twenty thousand tensors has some hundred groups.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from convert.matching.vocabulary import meanings, said

Shape = tuple[int, ...]
Index = tuple[int, ...]
_NUMBER = re.compile(r"\d+")
_ALIKE = 0.5  # the share of their tensors that most layers of a stack have in common, at least


@dataclass
class TensorGroup:
    """Tensors of one name but for the numbers of their layers.

    `parts` are the parts of the name, "#" for such a number; those that say which of several
    layers a tensor belongs to (`norm1`, `Dense_0`) stay in them. `members` are by their numbers.
    """

    parts: tuple[str, ...]
    members: dict[Index, str] = field(default_factory=dict)
    shapes: dict[Index, Shape] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name with "#" for numbers."""
        return ".".join(self.parts)

    @property
    def sizes(self) -> Shape | None:
        """How many layers each number counts; None where they are no grid."""
        axes = [sorted({i[k] for i in self.members}) for k in range(len(self.indices[0]))]
        count = 1
        for axis in axes:
            count *= len(axis)
        return tuple(map(len, axes)) if count == len(self.members) else None

    @property
    def indices(self) -> list[Index]:
        """In order."""
        return sorted(self.members)

    @property
    def shape(self) -> Shape | None:
        """Of every member; None where they differ."""
        shapes = set(self.shapes.values())
        return shapes.pop() if len(shapes) == 1 else None

    @property
    def block(self) -> tuple[str, ...]:
        """The parts up to the last number of a layer."""
        last = max((i for i, p in enumerate(self.parts) if "#" in p), default=-1)
        return self.parts[: last + 1]


def grouped(tensors: Mapping[str, Shape]) -> list[TensorGroup]:
    """The groups of a header's tensors, in the order of their first."""
    counting = _counting(tensors)
    groups: dict[tuple[str, ...], TensorGroup] = {}
    for name, shape in tensors.items():
        parts, index = _taken_out(name, counting)
        group = groups.setdefault(parts, TensorGroup(parts))
        group.members[index] = name
        group.shapes[index] = shape
    return _adopted(list(groups.values()))


def _adopted(groups: list[TensorGroup]) -> list[TensorGroup]:
    """With a tensor that one layer alone calls otherwise in the group that lacks it there: where
    all other parts of its name, and its shape, are those that the group would have."""
    every: dict[tuple[str, ...], set[Index]] = {}
    for g in groups:
        if len(g.members) > 1:
            every.setdefault(g.block, set()).update(g.members)
    alone = [g for g in groups if len(g.members) == 1]
    gone: set[int] = set()
    for g in sorted(groups, key=lambda g: len(said(g.parts).words)):  # a known name is the group's
        missing = every.get(g.block, set()) - set(g.members)
        if id(g) in gone or len(missing) != 1:
            continue
        (index,) = missing
        expected = _named(g.parts, index)
        able = [
            h for h in alone
            if h is not g and id(h) not in gone and len(h.members) == 1
            and _one_apart(expected, h, g.shape)
        ]  # fmt: skip
        if len(able) == 1:
            (name,) = able[0].members.values()
            g.members[index] = name
            g.shapes[index] = next(iter(able[0].shapes.values()))
            gone.add(id(able[0]))
    return [g for g in groups if id(g) not in gone]


def _named(parts: tuple[str, ...], index: Index) -> list[str]:
    numbers = iter(index)
    return [re.sub("#", lambda _: str(next(numbers)), p) for p in parts]


def _one_apart(expected: list[str], other: TensorGroup, shape: Shape | None) -> bool:
    (name,) = other.members.values()
    parts = name.split(".")
    return (
        len(parts) == len(expected)
        and sum(a != b for a, b in zip(parts, expected, strict=True)) == 1
        and shape in (None, other.shape)
    )


def _taken_out(name: str, counting: Mapping[str, bool]) -> tuple[tuple[str, ...], Index]:
    parts: list[str] = []
    index: list[int] = []
    around = ""
    for part in name.split("."):
        numbers = _NUMBER.findall(part)
        pattern = _NUMBER.sub("#", part)
        where = f"{around}.{pattern}"
        if numbers and counting.get(where):
            index += map(int, numbers)
            parts.append(pattern)
        else:
            parts.append(part)
        around = f"{around}.{parts[-1]}"
    return tuple(parts), tuple(index)


def _counting(names: Iterable[str]) -> dict[str, bool]:
    """Of each part with a number, below what is around it, whether the number counts layers.

    It does where what stands below its values is alike, and is more than one layer's tensors; a
    number that has one value only counts too.
    """
    answers: dict[str, bool] = {}
    level = [tuple(n.split(".")) for n in names]
    heads: dict[str, list[tuple[str, ...]]] = {"": level}
    while heads:
        below: dict[str, list[tuple[str, ...]]] = defaultdict(list)
        for around, rests in heads.items():
            by_pattern: dict[str, dict[str, set[tuple[str, ...]]]] = defaultdict(
                lambda: defaultdict(set)
            )
            for rest in rests:
                if len(rest) > 1:
                    by_pattern[_NUMBER.sub("#", rest[0])][rest[0]].add(rest[1:])
            for pattern, values in by_pattern.items():
                if "#" in pattern:
                    answers[f"{around}.{pattern}"] = _alike(list(values.values()), pattern)
            for rest in rests:
                if len(rest) > 1:
                    pattern = _NUMBER.sub("#", rest[0])
                    part = pattern if answers.get(f"{around}.{pattern}") else rest[0]
                    below[f"{around}.{part}"].append(rest[1:])
        heads = below
    return answers


def _alike(values: list[set[tuple[str, ...]]], pattern: str) -> bool:
    """Whether the subtrees under the values of a number are layers of one stack."""
    sets = [{tuple(_NUMBER.sub("#", p) for p in rest) for rest in v} for v in values]
    if {"attn", "mlp", "norm", "embed"} & set(meanings(pattern)[0]):
        return False  # Attention_0 and Attention_1 are two parts of one layer
    deep = any(len(rest) > 1 for s in sets for rest in s)
    if not deep and (pattern != "#" or len(sets) < 3 or any(s != sets[0] for s in sets)):
        return False  # single layers: norm1, norm2; the linear layers of a Sequential
    most = max(sets, key=len)
    alike = [len(s & most) / len(s | most) for s in sets]
    return sorted(alike)[len(alike) // 2] >= _ALIKE and min(alike) >= _ALIKE / 2
