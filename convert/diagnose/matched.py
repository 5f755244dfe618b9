"""Parameters of one side beside those of the other: which of them are at fault."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from convert.diagnose.causes import Reason, found
from convert.diagnose.hypotheses_tensors import explain_tensor
from convert.matching.bare import Copies, copies
from convert.matching.pair import Match
from convert.matching.stacked import layer_by_layer
from convert.runtime.arrays import to_numpy
from convert.runtime.pure_module import FlaxModule
from convert.runtime.torch_module import state
from zoo.layout.kinds import torch_kind
from zoo.layout.ops import inverse, run, run_shapes

# What another pairing of layers or of axes would explain as well.
_PAIRED = ("swapped", "transposed", "flipped", "permuted")
Helps = Callable[[Mapping[str, np.ndarray]], tuple[int, float]]


class Matched:
    """The values of both sides, compared in Flax's layout.

    Numbers that lie elsewhere are a fault only if Flax comes nearer to torch where they are put
    right, which `helps` tells of values of Flax's: else it is the pairs that are wrong.
    """

    def __init__(
        self, module: Any, side: FlaxModule, matches: Sequence[Match], helps: Helps | None = None
    ) -> None:
        self._helps = helps
        self.modules = dict(module.named_modules())
        tensors = state(module)
        self.names: dict[int, list[str]] = {}
        for name, tensor in tensors.items():
            self.names.setdefault(id(tensor), []).append(name)
        self.ids = {name: id(tensor) for name, tensor in tensors.items()}
        self.torch = {n: to_numpy(t) for n, t in tensors.items()}
        self.flax = {n: to_numpy(v) for n, v in side.values.items()}
        self.matches = [
            m
            for m in matches
            if all(n in self.torch for n in m.torch) and all(n in self.flax for n in m.flax)
        ]
        # Layer by layer where Flax stacks them, so that the one at fault is named.
        self.single: list[Match] = []
        for m in self.matches:
            for one, place in layer_by_layer(m):
                self.single.append(one)
                if place is not None:
                    held = zip(one.flax, m.flax, strict=True)
                    self.flax |= {name: self.flax[stack][place] for name, stack in held}
        self._wrong: list[tuple[Match, Reason]] | None = None

    def expected(self, match: Match) -> list[np.ndarray]:
        """What Flax should hold."""
        return run(match.ops, [self.torch[n] for n in match.torch])

    def of_layer(self, name: str, path: str) -> Reason | None:
        """What is wrong with a layer's own parameters."""
        for match, reason in self.wrong():
            below = f"{path}."
            if self._owner(match) == name or any(f.startswith(below) for f in match.flax if path):
                return reason
        return None

    def unverified(
        self, container: str, past: Collection[str], paired: Collection[str]
    ) -> Reason | None:
        """What is wrong with parameters inside a container that no layer's own call will show.

        `past` are the layers that were seen to be right, `paired` those that are looked at.
        """
        for match, reason in self.wrong():
            owner = self._owner(match)
            inside = not container or owner == container or owner.startswith(f"{container}.")
            plain = torch_kind(self.modules[owner]) not in ("other", "attention")
            if inside and owner not in past and not (plain and owner in paired):
                return reason
        return None

    def owner(self, tensor: str) -> str:
        """The torch module that holds a tensor, by the tensor's name."""
        return next(
            (self._owner(m) for m, e in self.wrong() if e.tensor == tensor),
            tensor.rpartition(".")[0],
        )

    def copies(self) -> dict[str, Copies]:
        """What torch has once and Flax several times, by torch's first name."""
        ties = {n: first for first, *others in self.names.values() for n in others}
        return copies(self.single, ties)

    def _owner(self, match: Match) -> str:
        owner, _, leaf = match.torch[0].rpartition(".")
        layer = re.search(r"_(l\d+(_reverse)?)$", leaf)
        single = f"{owner}.{layer[1]}" if layer else owner  # of a stack that is called by layers
        return single if single in self.modules else owner

    def wrong(self) -> list[tuple[Match, Reason]]:
        """Every match whose values differ, and why, in torch's order."""
        if self._wrong is None:
            order = {n: i for i, n in enumerate(self.torch)}
            found = sorted(self._compare(), key=lambda item: order[item[0].torch[0]])
            moved = any(reason.cause in _PAIRED for _, reason in found)
            if moved and self._helps is not None and self._helps(self._put_right()) <= (0, 0.0):
                found = [item for item in found if item[1].cause not in _PAIRED]
            self._wrong = found
        return self._wrong

    def _put_right(self) -> dict[str, np.ndarray]:
        """What Flax should hold, of all that it holds otherwise."""
        made = {}
        for match in self.matches:
            for name, right in zip(match.flax, self.expected(match), strict=True):
                held = self.flax[name]
                if right.shape == held.shape and not np.array_equal(right, held, equal_nan=True):
                    made[name] = right.astype(held.dtype)
        return made

    def _compare(self) -> Iterator[tuple[Match, Reason]]:
        for match in self.single:
            for name, right in zip(match.flax, self.expected(match), strict=True):
                held = self.flax[name]
                if right.shape == held.shape and np.array_equal(
                    right.astype(held.dtype), held, equal_nan=True
                ):
                    continue
                yield match, self._why(match, name, right, held)

    def _why(self, match: Match, name: str, right: np.ndarray, held: np.ndarray) -> Reason:
        """Why Flax's tensor `name` is not what it should be."""
        first = match.torch[0]
        title = first
        if len(match.torch) > 1:
            title = f"{title} (and {len(match.torch) - 1} more that are joined with it)"
        if len(match.flax) > 1:
            title = f"{title} (Flax's {name})"
        ties = [n for t in match.torch for n in self.names[self.ids[t]] if n != t]
        others = self._others(name)
        right_ones = [n for n, (path, x) in others.items() if np.array_equal(self.flax[path], x)]
        given = {n: x for n, (_, x) in others.items()}
        why = explain_tensor(title, right, held, given, match.kind, right_ones)
        if ties and (why is None or why.cause == "default"):
            return found("tied", name=first, other=ties[0], flax=name, tensor=first)
        if why is None:
            count = int((right != held).sum()) if right.shape == held.shape else held.size
            return found("values", name=title, count=count, size=held.size, flax=name, tensor=first)
        return dataclasses.replace(why, tensor=first)

    def _others(self, name: str) -> dict[str, tuple[str, np.ndarray]]:
        """All other tensors of torch: Flax's name, and the values as Flax lays them out."""
        others = {}
        for other in self.single:
            for path, values in zip(other.flax, self.expected(other), strict=True):
                if path != name:
                    several = len(other.flax) > 1
                    title = f"{other.torch[0]} ({path})" if several else other.torch[0]
                    others[title] = path, values
        return others

    def to_torch(self, match: Match, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Flax's values of a match, as torch lays them out."""
        shapes = [self.torch[n].shape for n in match.torch]
        assert run_shapes(match.ops, shapes) == [v.shape for v in values]
        return run(inverse(match.ops, shapes), values)
