"""The finished but not yet committed checkpoint, read again and held against what was meant."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from convert.engine.stream import Stream, Streamed
from zoo.checkpoint.ahead import prefetch
from zoo.checkpoint.apply import apply
from zoo.checkpoint.hashes import HashTree, digest, in_order
from zoo.checkpoint.label import Label, read_label
from zoo.checkpoint.plan import Plan, Step
from zoo.checkpoint.progress import Progress
from zoo.checkpoint.reading import Buffers, hash_leaves, hashed
from zoo.checkpoint.slabs import Slab, cut, pieces
from zoo.containers import open_checkpoint
from zoo.containers.base import Reader, TensorInfo
from zoo.containers.errors import NotEquivalent
from zoo.containers.strided import ordered, strips
from zoo.layout.cuts import Need
from zoo.layout.ops import inverse


class Canonical:
    """Gathers canonical tensors from what the recheck reads, so that nothing is read twice."""

    def __init__(self, plan: Plan) -> None:
        self.values: dict[str, np.ndarray] = {}
        self._undo = {
            tuple(t.name for t in view.entry.torch): inverse(
                view.ops, [t.shape for t in view.entry.torch]
            )
            for _, view in plan.pairs()
            if view.tensors
        }

    def __call__(self, step: Step, arrays: list[np.ndarray]) -> None:
        """Take a step's targets."""
        made = apply(self._undo[step.names], arrays)
        self.values |= dict(zip(step.names, made, strict=True))


def recheck(
    stream: Stream,
    moved: Streamed,
    written: Path,
    ties: Mapping[str, str],
    label: Label,
    made: Mapping[str, str],
    progress: Progress,
    keep: Canonical | None,
) -> dict[str, object]:
    """Re-read what was written, hash it, map it back, and compare that bit for bit with what was
    read; `keep` is given all of it. Gives what was verified, for the certificate; NotEquivalent
    with what differs.

    A cast cannot be mapped back: there the written bits are compared with those meant. `made` are
    the hashes of tensors that the source did not have.
    """
    plan = stream.plan
    wrong: list[str] = []
    with ExitStack() as stack:
        reader = stack.enter_context(open_checkpoint(written, "flax"))
        _refuse_header(reader, plan, ties)
        if not _same_label(read_label(reader), label):
            wrong.append("the label was not written as made")
        back = _Back(stream, moved, reader, keep)
        total, done = sum(s.nbytes for s in back.slabs), 0
        for slab, (problem, arrays) in zip(back.slabs, back.results(), strict=True):
            wrong += [problem] if problem else []
            if keep is not None and not problem:
                keep(slab.step, arrays)
            done += slab.nbytes
            progress("verify", done, total)
        lacking = {n: tree for n, tree in moved.targets.items() if not tree.complete}
        read = [n for n in (*made, *ties) if n not in ties or reader.ties.get(n) != ties[n]]
        others = {n: HashTree(stream.kind, reader.tensors[n]) for n in read}
        for name, _, error in hashed(reader, lacking | others, stream.workers):
            wrong += [f"{name}: {error.problem}"] if error else []
    if not wrong:
        told = {**made} | {n: moved.targets[to].hexdigest() for n, to in ties.items()}
        found = {n: tree.hexdigest() for n, tree in others.items()}
        wrong = [f"{n} was not written as made" for n in found if found[n] != told[n]]
    if wrong:
        raise NotEquivalent(
            f"{len(wrong)} tensors came back different: {'; '.join(wrong[:5])}",
            "nothing was kept; the disk or the container's library is at fault, please report it",
        )
    nbytes = sum(s.nbytes for s in plan.steps)
    return {"level": "bits", "tensors": len(plan.steps) + len(plan.made), "bytes": nbytes}


class _Back:
    """The slabs on their way back; whole steps, whose arrays are the caller's own, where they are
    to be kept."""

    def __init__(
        self, stream: Stream, moved: Streamed, reader: Reader, keep: Canonical | None
    ) -> None:
        self._stream, self._moved, self._reader = stream, moved, reader
        self._keeps = keep is not None
        self.slabs = cut(stream.plan.steps, None, 1) if self._keeps else stream.slabs
        self._buffers = Buffers()

    def results(self) -> Iterator[tuple[str, list[np.ndarray]]]:
        """Of each slab what is wrong with it, and the arrays."""
        waiting = self._stream.workers if self._keeps else None
        jobs = [functools.partial(self._check, i) for i in range(len(self.slabs))]
        return prefetch(jobs, self._stream.workers, waiting)

    def _check(self, number: int) -> tuple[str, list[np.ndarray]]:
        slab = self.slabs[number]
        step = slab.step
        named = [(step.targets[t], (t, region)) for t, region in slab.writes]
        buffers = Buffers() if self._keeps else self._buffers
        read = buffers.read(self._reader, named)
        if slab.is_cast:
            same = self._as_meant(number, slab, read)
        elif slab.is_copy:
            same = all(self._copied(step, need, array) for need, array in read)
        else:
            self._hash_targets(slab, read)
            same = all(self._maps_back(step, need, read) for need in slab.reads)
        problem = f"{', '.join(step.targets)} does not map back to {', '.join(step.sources)}"
        return "" if same else problem, [array for _, array in read] if self._keeps else []

    def _hash_targets(self, slab: Slab, read: Sequence[tuple[Need, np.ndarray]]) -> None:
        for (t, region), array in read:
            tree = self._moved.targets[slab.step.targets[t]]
            if tree.holds(region):
                hash_leaves(tree, region, array)

    def _as_meant(self, number: int, slab: Slab, read: Sequence[tuple[Need, np.ndarray]]) -> bool:
        self._hash_targets(slab, read)
        found = [digest(self._stream.kind, in_order(a) if a.size else b"") for _, a in read]
        return found == [self._moved.meant[number, n] for n in range(len(read))]

    def _copied(self, step: Step, need: Need, array: np.ndarray) -> bool:
        """Whether the leaves are the source's; they are the target's too."""
        (i, region), same = need, True
        source, target = (
            trees[names[i]]
            for trees, names in (
                (self._moved.sources, step.sources),
                (self._moved.targets, step.targets),
            )
        )
        for number, at in target.leaves(region):
            found = digest(target.kind, in_order(array[at]))
            target.put(number, found)
            same &= not source.differs(number, found)
        return same

    def _maps_back(self, step: Step, need: Need, read: Sequence[tuple[Need, np.ndarray]]) -> bool:
        i, region = need
        view = pieces(step.back, step.target_infos, read, need)
        tree = self._moved.sources[step.sources[i]]
        if not tree.holds(region):  # not in the order of the hash: held against the source itself
            read_again = functools.partial(self._stream.reader.read, step.sources[i])
            return all(
                np.array_equal(in_order(read_again(part)), in_order(ordered(block)))
                for block, part in strips(view, region)
            )
        return not any(
            tree.differs(number, digest(tree.kind, in_order(ordered(view[at]))))
            for number, at in tree.leaves(region)
        )


def _refuse_header(reader: Reader, plan: Plan, ties: Mapping[str, str]) -> None:
    """NotEquivalent where there are other tensors, or tensors of other shapes, than were meant."""
    meant: dict[str, TensorInfo] = plan.target_tensors()
    meant |= {name: meant[to] for name, to in ties.items()}
    if meant.keys() != reader.tensors.keys():
        names = ", ".join(sorted(meant.keys() ^ reader.tensors.keys())[:3])
        raise NotEquivalent(
            f"the result does not hold the tensors that were meant: {names}",
            "nothing was kept; please report it",
        )
    if wrong := [f"{n} as {reader.tensors[n]}" for n in meant if reader.tensors[n] != meant[n]]:
        raise NotEquivalent(
            f"the result holds tensors that are not as they were meant: {'; '.join(wrong[:3])}",
            "nothing was kept; please report it",
        )


def _same_label(read: Label, meant: Label) -> bool:
    told = [(label.model, label.config, label.layout, label.carried) for label in (read, meant)]
    return told[0] == told[1] and read.problem is None
