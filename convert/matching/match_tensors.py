"""Which tensor of anybody's PyTorch model is which of anybody's Flax model."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from convert.matching.by_names import Chosen, by_names, called
from convert.matching.by_values import Values, pairs_by_print
from convert.matching.evidence import Found, MatchedLayout, Open, OpenMatch, believed
from convert.matching.groups import grouped
from convert.matching.hints import of_biases, refuse_swapped
from convert.matching.holding import MatchSide, hold
from convert.matching.leftover import constants, eliminated, looked_up, single, surplus
from convert.matching.orientation import UnitPair, choose, transposed_weights
from convert.matching.pairing import Pairing
from convert.matching.rotary import ROTARY, in_pairs, rotated
from convert.matching.unit_entries import entries
from convert.matching.units import Unit, Way, aligned, ways
from zoo.checkpoint.problems import dims
from zoo.containers.errors import UsageError, ZooError
from zoo.layout import Entry, constant, tie

MARGIN = 1.0  # by how much names must speak for a pair, where values say nothing
_SAMPLE = 12  # groups of tensors that tell whether both sides hold the same weights
_SHOWN = 20
_SURE = 99.0  # a margin that is as good as any larger one
NOT_CHECKED = "not checked: no values and no outputs were compared, only names and shapes"
ONLY = "only in PyTorch", "only in Flax"


def match_tensors(
    torch_side: Any,
    flax_side: Any,
    pairs: Mapping[str, str] | None = None,
    rotary: str | None = None,
    execution: Pairing | None = None,
    order_first: bool = False,
) -> MatchedLayout:
    """The layout of two sides, as `convert.match` has it, without running anything.

    `execution` is what a run of both modules told: it settles what names leave open, or, with
    `order_first`, comes before names.
    """
    with ExitStack() as stack:
        ours, theirs = hold(torch_side, "torch", stack), hold(flax_side, "flax", stack)
        refuse_swapped(ours.tensors, theirs.tensors)
        work = _Matching(ours, theirs, dict(pairs or {}), _checked_rotary(rotary))
        if execution is not None and order_first:
            work.take(executed(execution))
        work.names()
        work.values()
        if execution is not None:
            work.settle(execution)
        work.rest()
        return work.result()


class _Matching:
    """What is found so far; each step looks at what the ones before left open."""

    def __init__(
        self, ours: MatchSide, theirs: MatchSide, given: dict[str, str], rotary: str | None
    ) -> None:
        self.sides = ours, theirs
        self.rotary = rotary
        self.given = given
        _check_given(ours, theirs, given)
        self.found: list[Found] = []
        self.open: list[tuple[UnitPair, Chosen, str]] = []
        self.left: tuple[list[Unit], list[Unit]] = [], []
        self.chosen: list[Chosen] = []
        self.same = False  # whether both sides hold the same weights
        self.tried: list[str] = []
        self.read = Values(ours.read, theirs.read)

    def take(self, found: list[Found]) -> None:
        """Entries that are settled."""
        self.found += found

    def settle(self, execution: Pairing) -> None:
        """What is open or left, by the order of execution."""
        done = self._done()
        found = [
            (made, evidence) for made, evidence in executed(execution)
            if not any(t.name in done[0] for e in made for t in e.torch)
            and not any(t.name in done[1] for e in made for t in e.flax)
        ]  # fmt: skip
        self.take(found)
        taken = self._done()
        self.open = [o for o in self.open if not _touches(o[0].ours, taken[0])]
        for side, names in zip(self.left, taken, strict=True):
            side[:] = [u for u in side if not _touches(u, names)]
        self.tried.append(f"order of execution: {len(found)} tensors")

    def names(self) -> None:
        """Pairs of what is not settled, by names and shapes."""
        done = self._done()
        absent = {t for t, f in self.given.items() if not f}
        torch, flax = (
            {n: i.shape for n, i in side.tensors.items() if n not in taken}
            for side, taken in zip(self.sides, done, strict=True)
        )
        torch = {n: s for n, s in torch.items() if n not in self.sides[0].ties and n not in absent}
        self.chosen, *left = by_names(torch, flax, {t: f for t, f in self.given.items() if f})
        self.left = left[0], left[1]
        self.tried.append(f"names and shapes: {len(self.chosen)} groups of tensors")

    def _done(self) -> tuple[set[str], set[str]]:
        return (
            {t.name for made, _ in self.found for e in made for t in e.torch},
            {t.name for made, _ in self.found for e in made for t in e.flax},
        )

    def values(self) -> None:
        """What was chosen by names, held against the values where both sides hold the same."""
        pairs = [
            (UnitPair(a, b, ways(a, b)), c)
            for c in self.chosen
            for a, b in aligned(c.ours, c.theirs)
        ]
        kept = transposed_weights([p.ours for p, _ in pairs])
        decided = choose([p for p, _ in pairs], kept)
        self.same = self._hold_the_same()
        if self.same:
            self.tried.append("values: both sides hold the same weights")
        for (pair, chosen), (way, why) in zip(pairs, decided, strict=True):
            if self.same:
                self._by_values(pair, chosen, way, why)
            else:
                self._by_names(pair, chosen, way, why)
        if self.same or not self.chosen:
            self._look_up()

    def _hold_the_same(self) -> bool:
        """Whether the smallest tensors that tell have the values of those that names say they are:
        not where most differ, as in a model that was tuned on one side."""
        equal = differing = 0
        for c in sorted(self.chosen, key=lambda c: _size(c.ours)):
            mine = self.read.print_of(0, c.ours)
            if mine.plain:
                continue
            alike = mine == self.read.print_of(1, c.theirs)
            equal += alike
            differing += not alike and c.margin >= MARGIN
            if equal + differing == _SAMPLE:
                break
        return equal >= differing if equal else self._some_equal()

    def _some_equal(self) -> bool:
        """Whether any of the smallest tensors is on both sides, whatever it is called."""
        ours = single([c.ours for c in self.chosen] + self.left[0])
        theirs = single([c.theirs for c in self.chosen] + self.left[1])
        few = [sorted(side, key=_size)[:_SAMPLE] for side in (ours, theirs)]
        return any(pairs_by_print(self.read, *few))

    def _by_values(self, pair: UnitPair, chosen: Chosen, way: Way | None, why: str) -> None:
        prints = self.read.print_of(0, pair.ours), self.read.print_of(1, pair.theirs)
        if prints[0] == prints[1]:
            if prints[0].plain:  # one value throughout, which tells nothing
                self._by_names(pair, chosen, way, why, "values")
                return
            made = self.read.fitting(pair.ours, pair.theirs, [way] if way else [])
            if made is not None:
                self._settle(pair, made, "values", "values", checked="values")
                return
        if self._is_given(chosen):  # whoever says so knows that its values differ
            self._by_names(pair, chosen, way, why)
            return
        self.left[0].append(pair.ours)
        self.left[1].append(pair.theirs)

    def _by_names(
        self, pair: UnitPair, chosen: Chosen, way: Way | None, why: str, checked: str = ""
    ) -> None:
        if way is None:
            self.open.append((pair, chosen, "shapes allow several orders of axes"))
        elif chosen.margin < MARGIN and not self._is_given(chosen):
            self.open.append((pair, chosen, "names do not tell"))
        elif self._flips(pair) and not self._is_given(chosen):
            self.open.append((pair, chosen, "a transposed convolution: its kernel may be flipped"))
        elif self.rotary is None and self._turned(pair) and not self._is_given(chosen):
            self.open.append((pair, chosen, ROTARY))
        else:
            made = list(entries(pair.ours, pair.theirs, way))
            if self.rotary == "pairs" and self._turned(pair):
                made = in_pairs(made, pair)
            by = "given" if self._is_given(chosen) else "names"
            score, margin = round(chosen.score, 2), round(min(chosen.margin, _SURE), 2)
            of = {"score": score, "margin": margin, "rivals": chosen.rivals}
            self._settle(pair, made, by, why, checked=checked, **of)

    def _flips(self, pair: UnitPair) -> bool:
        """Whether this is the kernel of a transposed convolution, whose bias is as long as its
        second axis: Flax's flips it, or does not."""
        (group, *_) = pair.ours.groups
        name, shape = next(iter(group.members.values())), next(iter(group.shapes.values()))
        bias = self.sides[0].tensors.get(f"{name.rpartition('.')[0]}.bias")
        if len(shape) < 3 or bias is None or len(bias.shape) != 1 or shape[0] == shape[1]:
            return False
        return bias.shape[0] == shape[1] and bias.shape[0] != shape[0]

    def _turned(self, pair: UnitPair) -> bool:
        """Whether features of a query or key may be rotated, and Flax may keep them otherwise: a
        codebase that has other names may have another order."""
        return rotated(pair, [u for c in self.chosen for u in c.ours.groups])

    def _is_given(self, chosen: Chosen) -> bool:
        return any(n in self.given for n in called(chosen.ours))

    def _settle(self, pair: UnitPair, made: list[Entry], by: str, axes: str, **of: Any) -> None:
        self.found.append(believed(made, pair.ours.names, pair.theirs.names, by, axes, **of))

    def _look_up(self) -> None:
        """Pairs of equal values among what names paired wrongly, or not at all."""
        found = list(looked_up(self.read, *self.left))
        self.found += found
        if found and not self.same:
            self.same = True
            self.tried.append("values: both sides hold the same weights")
        done = self._done()
        for side, taken in zip(self.left, done, strict=True):
            side[:] = [u for u in side if not _touches(u, taken)]

    def rest(self) -> None:
        """Ties, known constants, and what is left alone on either side."""
        self.found += eliminated(*self.left, self.same)

    def result(self) -> MatchedLayout:
        """The layout. ZooError where anything is open."""
        ours, theirs = self.sides
        done = self._done()
        left = [n for n in ours.tensors if n not in done[0]]
        free = [n for n in theirs.tensors if n not in done[1]]
        extra: list[Entry] = []
        notices = [*ours.notices, *theirs.notices]
        for name in list(left):
            if ours.ties.get(name) in done[0]:
                extra.append(tie(name, ours.tensors[name].shape, ours.ties[name]))
                left.remove(name)
        pending = {n for p, _, _ in self.open for n in p.ours.members}
        told, ties = constants(ours, [n for n in left if n not in pending], done[0], self.given)
        extra += [constant(n, ours.tensors[n].shape, c) for n, c in told.items()]
        extra += [tie(n, ours.tensors[n].shape, to) for n, to in ties.items()]
        left = [n for n in left if n not in told and n not in ties]
        if told:
            notices.append(f"only PyTorch has, kept as constants: {_some(list(told))}")
        skipped = surplus(theirs, free)
        free = [n for n in free if n not in skipped]
        if skipped:
            notices.append(f"no weights, not matched: {_some(skipped)}")
        if self.open or left or free:
            raise self._error(left, free, pending)
        order = {n: k for k, n in enumerate(ours.tensors)}
        made = [self._collected(e) for made, _ in self.found for e in made]
        every = sorted([*made, *extra], key=lambda e: order[e.torch[0].name])
        evidence = [e for _, e in sorted(self.found, key=lambda f: order[f[0][0].torch[0].name])]
        if any(not e.checked for e in evidence):
            notices.append(NOT_CHECKED)
        return MatchedLayout(every, evidence, notices, self.tried)

    def _collected(self, entry: Entry) -> Entry:
        """The entry with its Linen collection: what moves with the batch, as Flax's side says, or
        by the name where it says nothing."""
        told = self.sides[1].statistics
        names = [t.name for t in entry.flax]
        moving = all(map(_moves, names)) if told is None else told.issuperset(names)
        return dataclasses.replace(entry, collection="batch_stats" if moving else "params")

    def _error(self, left: list[str], free: list[str], pending: set[str]) -> ZooError:
        taken = {n for p, _, _ in self.open for n in p.theirs.members}
        unsettled = [
            Open(p.ours.names, p.theirs.names, why, c.rivals, round(min(c.margin, _SURE), 2))
            for p, c, why in self.open
        ]
        unsettled += [Open((n,), (), ONLY[0]) for n in left if n not in pending]
        unsettled += [Open((), (n,), ONLY[1]) for n in free if n not in taken]
        return OpenMatch(
            f"{self.sides[0].title} and {self.sides[1].title}: {len(unsettled)} open",
            "settle them with --pair TORCH=FLAX (--pair TORCH= for what Flax does not have), "
            "or give both sides the same weights, or modules with --inputs",
            [*self._lines(unsettled), *of_biases(left)],
            self.found,
            unsettled,
            self.tried,
        )

    def _lines(self, unsettled: list[Open]) -> list[str]:
        """What is open in words, the first of each sort."""
        lines: list[str] = []
        for why, every in itertools.groupby(unsettled, lambda o: o.why if o.why in ONLY else ""):
            some = list(every)
            told = why or "open"
            lines += [f"{told}: {self._line(o)}" for o in some[:_SHOWN]]
            lines += [f"{told}: ... and {len(some) - _SHOWN} more"] if len(some) > _SHOWN else []
        return lines

    def _line(self, o: Open) -> str:
        if o.why in ONLY:
            side, names = (self.sides[0], o.torch) if o.torch else (self.sides[1], o.flax)
            return f"{names[0]} {dims(side.tensors[names[0]].shape)}"
        rivals = f", or {', '.join(o.rivals[:2])}" if o.rivals else ""
        return f"{' + '.join(o.torch)} -> {' + '.join(o.flax)}{rivals}: {o.why}"


def executed(execution: Pairing) -> list[Found]:
    """The entries of a pairing of layers, and why each is believed."""
    why = {p.flax: p.why for p in execution.layers}
    found = []
    for entry in execution.layout().entries:
        if entry.flax:
            owner = entry.flax[0].name.rpartition(".")[0]
            by = why.get(owner, "order")
            names = tuple(t.name for t in entry.torch), tuple(t.name for t in entry.flax)
            found.append(believed([entry], *names, "order" if by == "name" else by, "layer"))
    return found


def _touches(unit: Unit, names: set[str]) -> bool:
    return not unit.members.isdisjoint(names)


def _moves(name: str) -> bool:
    return name.rpartition(".")[2] in ("mean", "var")


def _checked_rotary(rotary: str | None) -> str | None:
    if rotary not in (None, "same", "pairs"):
        raise UsageError(f"rotary is {rotary!r}", "give 'same' or 'pairs'")
    return rotary


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _size(unit: Unit) -> int:
    return sum(math.prod(s) for g in unit.groups for s in g.shapes.values())


def _check_given(ours: MatchSide, theirs: MatchSide, given: Mapping[str, str]) -> None:
    known, there = (
        side.tensors.keys()
        | {g.name for g in grouped({n: i.shape for n, i in side.tensors.items()})}
        for side in (ours, theirs)
    )
    wrong = [f"PyTorch has no {t!r}" for t in given if t not in known]
    wrong += [f"Flax has no {f!r}" for f in given.values() if f and f not in there]
    if wrong:
        raise UsageError(
            f"tensors that were given as pairs: {'; '.join(wrong)}", "give names as they stand"
        )
