"""A layout as a whole: every entry, and how each tree spells it.

A tree is a spelling of the layout: torch's `state_dict`, NNX's names and Linen's, and of a family
whatever dialects it states.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

from zoo.layout.entries import Entry, Tensor, View
from zoo.layout.entries_json import entry_from_json, entry_to_json
from zoo.layout.kinds import kinds
from zoo.layout.ops import Permute, Shape, inverse, run_shapes
from zoo.layout.renames import Renames, below_collection
from zoo.layout.stacked import in_stacks

Tree = str
Side = Literal["torch", "flax"]
FLAX_TREES: tuple[Tree, ...] = ("nnx", "linen", "linen-compact", "nnx-scan", "linen-scan")
TREES: tuple[Tree, ...] = ("torch", *FLAX_TREES)  # those that every layout has
STACKED = ("nnx-scan", "linen-scan")  # equal layers are one tensor with a leading axis
COLLECTED = ("linen", "linen-compact", "linen-scan")  # names begin with a Linen collection


class Layout:
    """All entries of one model of one configuration. Raises ValueError where they contradict.

    `dialects` are further spellings: name -> the tree whose names they change, and how.
    """

    def __init__(
        self, entries: Iterable[Entry], dialects: Mapping[str, tuple[Tree, Renames]] | None = None
    ) -> None:
        self.entries: tuple[Entry, ...] = tuple(entries)
        self.dialects = dict(dialects or {})
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

    @property
    def trees(self) -> tuple[Tree, ...]:
        """Every spelling of it."""
        return (*TREES, *self.dialects)

    @functools.cached_property
    def stacks(self) -> bool:
        """Whether there are equal layers that a scanned tree stacks."""
        return len(self.view("nnx-scan")) < len(self.entries)

    def base(self, tree: Tree) -> Tree:
        """The tree whose names a dialect changes; any other is its own."""
        return self.dialects[tree][0] if tree in self.dialects else tree

    def side(self, tree: Tree) -> Side:
        """Whose framework has the tree."""
        return "torch" if self.base(tree) == "torch" else "flax"

    def view(self, tree: Tree) -> list[View]:
        """Every entry as `tree` spells it, in the order there. Entries without a counterpart there
        have no tensors; several of which the tree makes one tensor are one view."""
        if tree in self.dialects:
            base, renames = self.dialects[tree]
            return _renamed(self.view(base), renames, base in COLLECTED)
        if tree == "torch":
            return [View(e, e.torch, ()) for e in self.entries]
        if tree == "linen-compact":
            return self._compact_view()
        views = [View(e, e.flax, e.ops) for e in self.entries]
        if tree in STACKED:
            views = in_stacks(views)
        if tree in COLLECTED:
            views = [replace(v, tensors=_below(v.entry.collection, v.tensors)) for v in views]
        return views

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


def _below(prefix: str, tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(Tensor(f"{prefix}.{t.name}", t.shape) for t in tensors)


def _renamed(views: list[View], renames: Renames, collected: bool) -> list[View]:
    """The views under other names, in the order of those."""

    forth = functools.partial(below_collection, renames.forth) if collected else renames.forth
    made = [
        replace(v, tensors=tuple(Tensor(forth(t.name), t.shape) for t in v.tensors)) for v in views
    ]
    return sorted(made, key=lambda v: renames.place(v.tensors[0].name) if v.tensors else ())


def _check_sides(e: Entry) -> None:
    """ValueError for an entry with tensors on one side only, and nothing that says why."""
    told = (e.tied_to is not None) + (e.constant is not None)
    if not e.torch or told > 1 or (len(e.torch) != 1 if told else not e.flax):
        raise ValueError(f"{[t.name for t in e.torch]} and {[t.name for t in e.flax]} do not pair")
    if told and e.flax:
        raise ValueError(f"{e.torch[0].name} is only PyTorch's, and {e.flax[0].name} is stated too")
    if e.constant is not None:
        e.constant.check(e.torch[0].shape)


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
