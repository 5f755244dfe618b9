"""Where gradients part, told by values: an operation of torch's and an equation of Flax's that give
the same numbers should be given the same gradient, in whatever order or shape both lie.

The last value whose gradient is another, though all that is computed from it is given torch's own,
is where the backward passes part.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from convert.compare.differentiated import Differentiated, Place, shown
from convert.compare.flax_side import FlaxSide
from convert.compare.torch_side import TorchSide
from convert.diagnose.causes import found
from convert.diagnose.unseen import is_telling
from convert.program.operations import Operation
from convert.runtime.arrays import to_numpy
from convert.runtime.jax_values import Computed
from convert.runtime.precision import precision_of

_CLOSE = 1e-8  # of the largest value, in float64
_ROUGH = 1e-4  # where Flax computes a part in float32
_USES = 3  # of a value that are named


def parted(reference: TorchSide, flax: FlaxSide) -> Place | None:
    """The last value whose gradient is another; None where none can be told. Raises what a run
    raises."""
    narrow = flax.narrow_operation() is not None
    with precision_of("float64"):
        theirs, cotangents = flax.by_equation()
        ours = Differentiated(reference, "float64")
        return _Backward(ours, theirs, cotangents, _ROUGH if narrow else _CLOSE).last()


class _Backward:
    def __init__(
        self,
        ours: Differentiated,
        theirs: Sequence[Computed],
        cotangents: Sequence[np.ndarray],
        close: float,
    ) -> None:
        self.ours, self.close = ours, close
        self.operations = ours.mode.operations
        self.uses: dict[int, list[Operation]] = defaultdict(list)
        for operation in self.operations:
            for value in dict.fromkeys(operation.refs):
                self.uses[value].append(operation)
        self.theirs = _Classes(close)
        for number, (one, cotangent) in enumerate(zip(theirs, cotangents, strict=True)):
            self.theirs.add(number, one.value, cotangent, one.refs)
        self.largest = max((float(np.abs(c).max(initial=0.0)) for c in cotangents), default=0.0)

    def last(self) -> Place | None:
        """The place."""
        known = self._values()
        held = self.ours.mode.held
        cotangents = self.ours.cotangents([held[v] for v in known])
        by_value = {
            v: np.zeros(tuple(held[v].shape)) if c is None else to_numpy(c)
            for v, c in zip(known, cotangents, strict=True)
        }
        classes = _Classes(self.close)
        makers = {v: o for o in self.operations for v in o.made}
        for v, cotangent in by_value.items():
            refs = makers[v].refs if v in makers else ()
            classes.add(v, to_numpy(held[v].detach()), cotangent, refs)
        moments = {v: i for i, o in enumerate(self.operations) for v in o.made}
        wrong: list[tuple[float, list[int], np.ndarray]] = []
        for members in classes.all():
            other = self.theirs.like(classes.value(members[0]))
            right, given = classes.total(members), self.theirs.total(other) if other else None
            if right is None or given is None or right.size != given.size:
                continue
            if not self._same(right, given):
                used = [o for v in members for o in self.uses[v]]
                first = float(max(moments.get(v, -1) for v in members))
                if first < 0:  # a parameter or input stands just before its first use
                    first = min((moments[o.made[0]] for o in used), default=0) - 0.5
                wrong.append((first, members, given))
        if not wrong:
            return None
        _, members, given = max(wrong, key=lambda w: w[0])
        return self._place(members, given)

    def _values(self) -> list[int]:
        """Values that are differentiated, and were not written into afterwards."""
        held = self.ours.mode.held
        last = {id(t): v for v, t in enumerate(held)}
        leaves = [v for v, t in enumerate(held) if v in self.ours.mode.leaves]
        made = [v for o in self.operations for v in o.made]
        return [
            v for v in dict.fromkeys((*leaves, *made))
            if held[v].requires_grad and held[v].is_floating_point() and last[id(held[v])] == v
        ]  # fmt: skip

    def _same(self, right: np.ndarray, given: np.ndarray) -> bool:
        a, b = np.sort(right, None), np.sort(given, None)
        scale = float(np.abs(a).max(initial=0.0))
        return bool(np.abs(a - b).max(initial=0.0) <= 10 * self.close * scale
                    + self.close * self.close * self.largest)  # fmt: skip

    def _place(self, members: list[int], given: np.ndarray) -> Place:
        """The use of the value through which something else comes back."""
        held = self.ours.mode.leaves
        name = next((held[v].name for v in members if v in held), "")
        users = {
            o.made: o for v in members for o in self.uses[v] if not set(o.made) <= set(members)
        }
        unseen = [o for o in users.values() if not self._seen(o)]
        chosen = unseen or list(users.values()) or self.operations[-1:]
        maker = next((o for o in self.operations if members[0] in o.made), None)
        value = name if maker is None else _written(maker)
        zero = "zero" if not given.any() else "another"
        uses = ", ".join(dict.fromkeys(map(_written, chosen[:_USES])))
        reason = found("unknown", "use", value=value, zero=zero, uses=uses)
        return Place(reason, chosen[-1].module, shown(chosen[-1])[1])

    def _seen(self, operation: Operation) -> bool:
        """Whether Flax computes what the operation gives."""
        values = (self.ours.mode.held[v] for v in operation.made)
        return any(self.theirs.like(to_numpy(v.detach())) is not None for v in values)


def _written(operation: Operation) -> str:
    """The expression, with its file and line where they are known."""
    text, source = shown(operation)
    return f"`{text}` ({source})" if source else f"`{text}`"


class _Classes:
    """Values that are the same numbers, in whatever order."""

    def __init__(self, close: float) -> None:
        self.close = max(close, 1e-7)
        self._held: dict[int, tuple[np.ndarray, np.ndarray, tuple[int, ...]]] = {}
        self._by: dict[int, list[list[int]]] = defaultdict(list)  # by their size
        self._sorted: dict[int, np.ndarray] = {}

    def add(
        self, number: int, value: np.ndarray, cotangent: np.ndarray, refs: Iterable[int]
    ) -> None:
        """A value, if it can be told from others."""
        if not is_telling(value) or not np.isfinite(value).all():
            return
        self._held[number] = value, cotangent, tuple(refs)
        ordered = np.sort(value, None)
        for members in self._by[value.size]:
            if self._alike(ordered, self._sorted[members[0]]):
                members.append(number)
                return
        self._sorted[number] = ordered
        self._by[value.size].append([number])

    def _alike(self, a: np.ndarray, b: np.ndarray) -> bool:
        scale = float(np.abs(a).max())
        ends = abs(a[0] - b[0]) <= self.close * scale and abs(a[-1] - b[-1]) <= self.close * scale
        return bool(ends and np.abs(a - b).max() <= self.close * scale)

    def all(self) -> Iterator[list[int]]:
        """Every class, its members in the order of computing."""
        return itertools.chain.from_iterable(self._by.values())

    def like(self, value: np.ndarray) -> list[int] | None:
        """The class of this value."""
        ordered = np.sort(value, None)
        found = (m for m in self._by.get(value.size, ())
                 if self._alike(ordered, self._sorted[m[0]]))  # fmt: skip
        return next(found, None)

    def value(self, number: int) -> np.ndarray:
        """A member's value."""
        return self._held[number][0]

    def roots(self, members: Sequence[int]) -> list[int]:
        """Members that are not made of others."""
        held = set(members)
        return [v for v in members if not held & set(self._held[v][2])]

    def total(self, members: Sequence[int]) -> np.ndarray | None:
        """What comes back to the value in all; None where its parts lie in different orders."""
        first, *rest = self.roots(members)
        value, total, _ = self._held[first]
        for v in rest:
            other, cotangent, _ = self._held[v]
            if (
                other.shape != value.shape
                or np.abs(other - value).max() > self.close * np.abs(value).max()
            ):
                return None
            total = total + cotangent
        return total
