"""A layout as a whole: every entry, and how each tree spells it."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from zoo.layout.entries import Entry, Tensor
from zoo.layout.entries_json import entry_from_json, entry_to_json
from zoo.layout.kinds import kinds
from zoo.layout.ops import Ops, Permute, Shape, inverse, run_shapes

Tree = Literal["torch", "nnx", "linen", "linen-compact"]
TREES: tuple[Tree, ...] = ("torch", "nnx", "linen", "linen-compact")


@dataclass(frozen=True, slots=True)
class View:
    """One entry as a tree spells it: its tensors, and the ops that make them from the canonical."""

    entry: Entry
    tensors: tuple[Tensor, ...]
    ops: Ops


class Layout:
    """All entries of one model of one configuration. Raises ValueError where they contradict."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries: tuple[Entry, ...] = tuple(entries)
        names = Counter(t.name for e in self.entries for t in e.torch)
        flax_names = Counter(t.name for e in self.entries for t in e.flax)
        if twice := [n for c in (names, flax_names) for n, count in c.items() if count > 1]:
            raise ValueError(f"stand twice in the layout: {', '.join(twice)}")
        plain = {
            t.name: t.shape
            for e in self.entries
            if e.tied_to is None and e.constant is None
            for t in e.torch
        }
        for e in self.entries:
            _check_sides(e)
            made = run_shapes(e.ops, [t.shape for t in e.torch]) if e.flax else []
            if made != [t.shape for t in e.flax]:
                raise ValueError(f"{e.torch[0].name}: the ops give {made}, stated are {e.flax}")
            if e.tied_to is not None and plain.get(e.tied_to) != e.torch[0].shape:
                raise ValueError(
                    f"{e.torch[0].name} is tied to {e.tied_to}, which is not a tensor of that shape"
                )

    def view(self, tree: Tree) -> list[View]:
        """Every entry as `tree` spells it. Entries without a counterpart there have no tensors."""
        if tree == "torch":
            return [View(e, e.torch, ()) for e in self.entries]
        if tree == "nnx":
            return [View(e, e.flax, e.ops) for e in self.entries]
        if tree == "linen":
            return [
                View(e, tuple(Tensor(f"{e.collection}.{t.name}", t.shape) for t in e.flax), e.ops)
                for e in self.entries
            ]
        return self._compact_view()

    def _compact_view(self) -> list[View]:
        """The automatic names of `@nn.compact`: Dense_0, Conv_1, ..., counted in layout order."""
        table = kinds()
        counts: Counter[str] = Counter()
        modules: dict[str, str] = {}
        views = []
        for e in self.entries:
            ops = e.ops + e.compact_ops
            shapes = run_shapes(ops, [t.shape for t in e.torch]) if e.flax else []
            tensors = []
            for t, shape in zip(e.flax, shapes, strict=True):
                module, _, leaf = t.name.rpartition(".")
                if e.kind in table and (cls := table[e.kind].compact):
                    if module not in modules:
                        modules[module] = f"{cls}_{counts[cls]}"
                        counts[cls] += 1
                    module = modules[module]
                path = f"{module}.{leaf}" if module else leaf
                tensors.append(Tensor(f"{e.collection}.{path}", shape))
            views.append(View(e, tuple(tensors), ops))
        return views

    def shapes(self, tree: Tree) -> dict[str, Shape]:
        """Name -> shape of everything that a module of that side holds.

        For "torch" this is the state_dict: ties included, constants where still saved.
        """
        return {
            t.name: t.shape
            for v in self.view(tree)
            if v.entry.constant is None or v.entry.constant.in_state_dict
            for t in v.tensors
        }

    @property
    def parameters(self) -> int:
        """Number of trained values; ties count once, running statistics and constants not."""
        return sum(
            math.prod(t.shape) for e in self.entries if e.collection == "params" for t in e.flax
        )

    def to_json(self) -> list[dict[str, Any]]:
        """The layout as JSON data; `from_json` gives it back."""
        return [entry_to_json(e) for e in self.entries]

    @classmethod
    def from_json(cls, data: Iterable[Mapping[str, Any]]) -> Layout:
        """The layout that `to_json` gave."""
        return cls(entry_from_json(d) for d in data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.entries == other.entries

    def __hash__(self) -> int:
        return hash(self.entries)


def _check_sides(e: Entry) -> None:
    """ValueError for an entry with tensors on one side only, and nothing that says why."""
    told = (e.tied_to is not None) + (e.constant is not None)
    if not e.torch or told > 1 or (len(e.torch) != 1 if told else not e.flax):
        raise ValueError(f"{[t.name for t in e.torch]} and {[t.name for t in e.flax]} do not pair")
    if told and e.flax:
        raise ValueError(f"{e.torch[0].name} is only PyTorch's, and {e.flax[0].name} is stated too")
    if e.constant is not None:
        e.constant.check(e.torch[0].shape)


def between(source: View, target: View) -> tuple[Ops, Ops]:
    """The ops from the source's tensors to the target's, and those back again."""
    if source.ops == target.ops:
        return (), ()
    canonical = [t.shape for t in source.entry.torch]
    forth = inverse(source.ops, canonical) + target.ops
    back = inverse(target.ops, canonical) + source.ops
    return forth, back


def canonical_guess(flax: Mapping[str, Shape]) -> dict[str, Shape]:
    """Canonical names and shapes that a tree of NNX names would have if every module were plain.

    A guess, for finding sizes before a layout is known; the pairing with the layout that is then
    built decides. Names that are nobody's leaf stay as they are.
    """
    result = {}
    for name, shape in flax.items():
        module, dot, leaf = name.rpartition(".")
        for torch_leaf, axes in _leaves().get(leaf, ()):
            if axes is None or len(axes) == len(shape):
                if axes:
                    ((shape),) = run_shapes(inverse((Permute(axes),), [shape]), [shape])
                result[f"{module}{dot}{torch_leaf}"] = shape
                break
        else:
            result[name] = shape
    return result


@functools.cache
def _leaves() -> dict[str, list[tuple[str, tuple[int, ...] | None]]]:
    """NNX leaf -> torch's leaf and the axes there, of every kind that has it."""
    found: dict[str, list[tuple[str, tuple[int, ...] | None]]] = {}
    for kind in kinds().values():
        for torch_leaf, there in kind.leaves.items():
            found.setdefault(there.nnx, []).append((torch_leaf, there.axes))
    return found
