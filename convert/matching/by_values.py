"""Tensors of two checkpoints that hold the same weights, paired by their values.

An op only moves elements, so the sums of a tensor's bit patterns, and of their squares, stay what
they are under all of them, and add up where tensors are joined: a fingerprint that needs one
reading. Names propose, values decide; what names do not tell is looked up by its fingerprint.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from convert.matching.rearranged import gathered
from convert.matching.unit_entries import entries
from convert.matching.units import Unit, Way, ways
from zoo.layout import Entry, Tensor
from zoo.layout.ops import Flip, Reorder, Shape, run

Read = Callable[[str], np.ndarray]  # a tensor by its name


@dataclass(frozen=True)
class Print:
    """What no op of the vocabulary changes: number of elements, and sums of their bit patterns."""

    size: int
    total: int
    squares: int
    plain: bool = False  # all elements alike: fresh scales and biases tell nothing

    def __add__(self, other: Print) -> Print:
        return Print(
            self.size + other.size,
            (self.total + other.total) % _MODULUS,
            (self.squares + other.squares) % _MODULUS,
            self.plain and other.plain,
        )


_MODULUS = 1 << 64
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.uint64}


def fingerprint(x: np.ndarray) -> Print:
    """The fingerprint of an array."""
    bits = np.ascontiguousarray(x).reshape(-1).view(_BITS[x.dtype.itemsize])
    mixed = bits.astype(np.uint64)
    plain = bool(bits.size == 0 or (bits == bits[0]).all())
    mixed = (mixed + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # wraps
    mixed ^= mixed >> np.uint64(29)
    total = int(mixed.sum(dtype=np.uint64))
    squares = int((mixed * mixed).sum(dtype=np.uint64))
    return Print(x.size, total, squares, plain)


class Values:
    """The values of two checkpoints, read when asked for, fingerprinted once."""

    def __init__(self, torch: Read, flax: Read) -> None:
        self.read = torch, flax
        self._prints: tuple[dict[str, Print], dict[str, Print]] = ({}, {})

    def print_of(self, side: int, unit: Unit) -> Print:
        """Of all tensors of a unit."""
        found = Print(0, 0, 0, True)
        first: Print | None = None
        for g in unit.groups:
            for name in g.members.values():
                if name not in self._prints[side]:
                    self._prints[side][name] = fingerprint(self.read[side](name))
                found += self._prints[side][name]
                first = first or self._prints[side][name]
        return found

    def equal(self, entry: Entry) -> bool:
        """Whether the entry's ops make Flax's values of torch's, bit for bit."""
        made = run(entry.ops, [self.read[0](t.name) for t in entry.torch])
        wanted = (self.read[1](t.name) for t in entry.flax)
        return all(
            a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
            for a, b in zip(made, wanted, strict=True)
        )

    def fitting(self, ours: Unit, theirs: Unit, first: Sequence[Way]) -> list[Entry] | None:
        """The entries under which the values of all layers agree, by one of all ways, those named
        first tried first; or with one axis in another order. None where there is none."""
        known = list(first) + [w for w in ways(ours, theirs) if w not in first]
        for way in known:
            made = entries(ours, theirs, way)
            if (found := self._all_equal(made)) is not None:
                return found
        for way in known:
            if (found := self._all_equal(_flipped(ours, theirs, way))) is not None:
                return found
        for way in known:
            if found := self._reordered(list(entries(ours, theirs, way))):
                return found
        return self._gathered(ours, theirs)

    def _all_equal(self, made: Iterator[Entry]) -> list[Entry] | None:
        found = []
        for entry in made:
            if not self.equal(entry):
                return None
            found.append(entry)
        return found or None

    def _reordered(self, made: list[Entry]) -> list[Entry] | None:
        """With one axis of Flax's tensor read in another order: rotary features in pairs and in
        halves, gates between values."""
        if any(len(e.flax) > 1 for e in made):
            return None
        (x,) = run(made[0].ops, [self.read[0](t.name) for t in made[0].torch])
        y = self.read[1](made[0].flax[0].name)
        for op in reorders(x, y):
            found = [replace(e, ops=(*e.ops, op)) for e in made]
            if all(map(self.equal, found)):
                return found
        return None

    def _gathered(self, ours: Unit, theirs: Unit) -> list[Entry] | None:
        """By looking up where each value went, where the one side has one tensor only for some of
        the other's."""
        if theirs.count != 1 or len(theirs.groups) > 1 or ours.count * len(ours.groups) > _PARTS:
            return None
        (g,) = theirs.groups
        name, shape = next(iter(g.members.values())), next(iter(g.shapes.values()))
        held = [
            Tensor(h.members[i], h.shapes[i]) for i in ours.groups[0].indices for h in ours.groups
        ]
        found = gathered([self.read[0](t.name) for t in held], self.read[1](name))
        if found is None:
            return None
        order, ops = found
        entry = Entry("param", tuple(held[i] for i in order), (Tensor(name, shape),), ops)
        return [entry] if self.equal(entry) else None


_PARTS = 64


def _flipped(ours: Unit, theirs: Unit, way: Way) -> Iterator[Entry]:
    """The entries of a way with kernels back to front, as transposed convolutions have them: all
    axes of Flax's tensors but the last two."""
    shape = theirs.shape
    if shape is None or len(shape) < 3 or not way.each or len(ours.groups) > 1:
        return
    for e in entries(ours, theirs, way):
        yield replace(e, ops=(*e.ops, Flip(tuple(range(len(shape) - 2)))))


def reorders(x: np.ndarray, y: np.ndarray) -> Iterator[Reorder]:
    """Reorders of one axis that make `x` `y`."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return
    for axis, n in enumerate(x.shape):
        if n < 4:
            continue
        rows, wanted = ([r.tobytes() for r in np.moveaxis(a, axis, 0)] for a in (x, y))
        places = {r: k for k, r in enumerate(rows)}
        if len(places) < n or any(r not in places for r in wanted):
            continue
        yield from _as_reorder(axis, [places[r] for r in wanted])


def _as_reorder(axis: int, order: list[int]) -> Iterator[Reorder]:
    """The factors of an axis, and their order, that give this permutation."""
    n, plain = len(order), np.arange(len(order))
    for count in (2, 3):
        for sizes in _factors(n, count):
            for turn in itertools.permutations(range(count)):
                if turn != tuple(range(count)) and np.array_equal(
                    plain.reshape(sizes).transpose(turn).ravel(), order
                ):
                    yield Reorder(axis, sizes, turn)
                    return


def _factors(n: int, count: int) -> Iterator[Shape]:
    if count == 1:
        yield (n,)
        return
    for k in range(2, n):
        if n % k == 0 and n // k >= 2 ** (count - 1):
            for rest in _factors(n // k, count - 1):
                yield (k, *rest)


def pairs_by_print(
    values: Values, ours: Sequence[Unit], theirs: Sequence[Unit]
) -> Iterator[tuple[Unit, Unit]]:
    """Units of equal fingerprints, where no other has it."""
    by_print: dict[Print, tuple[list[Unit], list[Unit]]] = defaultdict(lambda: ([], []))
    for side, units in enumerate((ours, theirs)):
        for unit in units:
            made = values.print_of(side, unit)
            if not made.plain:
                by_print[made][side].append(unit)
    for a, b in by_print.values():
        if len(a) == len(b) == 1:
            yield a[0], b[0]
