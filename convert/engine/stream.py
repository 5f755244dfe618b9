"""The slabs of a plan, in a few threads: read, moved, hashed and written, each byte once."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from convert.engine.prepare import Prepared
from convert.engine.resume import Record, unlike
from convert.engine.targets import written_ties
from zoo.checkpoint.ahead import prefetch
from zoo.checkpoint.apply import cast, lost
from zoo.checkpoint.hashes import HashTree, digest, in_order
from zoo.checkpoint.progress import Progress
from zoo.checkpoint.reading import Buffers, hash_leaves, hashed
from zoo.checkpoint.slabs import Slab, cut, pieces
from zoo.containers.base import Writer
from zoo.containers.strided import contiguous


@dataclass
class Streamed:
    """What is known of the tensors once they have been written."""

    sources: dict[str, HashTree]
    targets: dict[str, HashTree]  # filled where they are read back
    # Of what was cast, the digest of each region as it was meant.
    meant: dict[tuple[int, int], bytes] = field(default_factory=dict)
    overflow: int = 0  # finite values that a cast made infinite or NaN

    def hashes(self, names: Sequence[str], side: Literal["source", "target"]) -> list[str]:
        """Of these tensors, or none where nothing was hashed."""
        trees = self.sources if side == "source" else self.targets
        return [trees[n].hexdigest() for n in names if n in trees]


class Stream:
    """A plan on its way from a reader to a writer. `kind` of hash is "" for none."""

    def __init__(self, prepared: Prepared, kind: str) -> None:
        self.reader, self.plan, self.kind = prepared.reader, prepared.plan, kind
        self.workers = prepared.workers
        self.ties: dict[str, list[str]] = {}
        if prepared.target.to == "safetensors":
            for name, to in written_ties(prepared.target, self.plan).items():
                self.ties.setdefault(to, []).append(name)
        self.slabs = cut(self.plan.steps, prepared.max_memory, self.workers)

    def write(self, writer: Writer, progress: Progress, record: Record | None = None) -> Streamed:
        """Give every slab to the writer, in the order of its files, but for those that the record
        says are written."""
        moved = self._begin()
        before = record.done if record else {}
        for number, told in before.items():
            if not self._restore(number, told, writer, moved):
                assert record is not None
                raise unlike(record.log)
        order = sorted(
            set(range(len(self.slabs))) - before.keys(),
            key=lambda i: (writer.place(_first(self.slabs[i])), i),
        )
        buffers = Buffers()
        jobs = [functools.partial(self._move, i, writer, moved, buffers, record) for i in order]
        total, done = sum(s.nbytes for s in self.slabs), sum(self.slabs[i].nbytes for i in before)
        for i, overflow in zip(order, prefetch(jobs, self.workers), strict=True):
            moved.overflow += overflow
            done += self.slabs[i].nbytes
            progress("convert", done, total)
        for _, _, error in hashed(self.reader, _lacking(moved.sources), self.workers):
            if error is not None:
                raise error
        return moved

    def _begin(self) -> Streamed:
        sources: dict[str, HashTree] = {}
        targets: dict[str, HashTree] = {}
        for step in self.plan.steps if self.kind else ():
            infos = zip(step.sources, step.source_infos, strict=True)
            sources |= {n: HashTree(self.kind, info) for n, info in infos}
            infos = zip(step.targets, step.target_infos, strict=True)
            targets |= {n: HashTree(self.kind, info) for n, info in infos}
        return Streamed(sources, targets)

    def _restore(self, number: int, told: dict[str, Any], writer: Writer, moved: Streamed) -> bool:
        """What `_record` noted of a slab that another run has written; False for what it cannot
        have noted."""
        if not 0 <= number < len(self.slabs):
            return False
        slab = self.slabs[number]
        leaves = list(self._leaves(slab, moved))
        if len(leaves) != len(told["leaves"]) or len(told["meant"]) > len(slab.writes):
            return False
        for (tree, leaf), value in zip(leaves, told["leaves"], strict=True):
            tree.put(leaf, bytes.fromhex(value))
        moved.meant |= {(number, n): bytes.fromhex(d) for n, d in enumerate(told["meant"])}
        moved.overflow += told["overflow"]
        for t, region in slab.writes:
            for name in (slab.step.targets[t], *self.ties.get(slab.step.targets[t], ())):
                writer.skip(name, region)
        return True

    def _record(self, number: int, moved: Streamed, overflow: int) -> dict[str, Any]:
        slab = self.slabs[number]
        meant = [moved.meant.get((number, n)) for n in range(len(slab.writes))]
        return {
            "leaves": [tree.leaf(leaf).hex() for tree, leaf in self._leaves(slab, moved)],
            "meant": [d.hex() for d in meant if d is not None],
            "overflow": overflow,
        }

    def _leaves(self, slab: Slab, moved: Streamed) -> Iterator[tuple[HashTree, int]]:
        """The leaves of sources that a slab holds whole."""
        for i, region in slab.reads:
            tree = moved.sources.get(slab.step.sources[i])
            if tree is not None and tree.holds(region):
                yield from ((tree, number) for number, _ in tree.leaves(region))

    def _move(
        self,
        number: int,
        writer: Writer,
        moved: Streamed,
        buffers: Buffers,
        record: Record | None,
    ) -> int:
        """Move one slab; the values that a cast lost."""
        overflow = self._moved(number, writer, moved, buffers)
        if record is not None:
            record.add(number, self._record(number, moved, overflow))
        return overflow

    def _moved(self, number: int, writer: Writer, moved: Streamed, buffers: Buffers) -> int:
        slab = self.slabs[number]
        step, overflow = slab.step, 0
        if slab.is_copy and not self.kind and self._copied(slab, writer):
            return 0
        read = buffers.read(self.reader, [(step.sources[i], (i, r)) for i, r in slab.reads])
        for (i, region), array in read:
            tree = moved.sources.get(step.sources[i])
            if tree is not None and tree.holds(region):
                hash_leaves(tree, region, array)
        for n, (t, region) in enumerate(slab.writes):
            piece = pieces(step.ops, step.source_infos, read, (t, region))
            if slab.is_cast:
                made = cast(contiguous(piece), step.target_infos[t].dtype)
                overflow += lost(contiguous(piece), made)
                if self.kind:
                    data = in_order(made) if made.size else b""
                    moved.meant[number, n] = digest(self.kind, data)
                piece = made
            for name in (step.targets[t], *self.ties.get(step.targets[t], ())):
                writer.write(name, piece, region)
        return overflow

    def _copied(self, slab: Slab, writer: Writer) -> bool:
        """Whether the kernel could copy the slab; if not, nothing of it counts as written."""
        ((i, region),) = slab.reads if len(slab.reads) == 1 else ((-1, ()),)
        if i < 0 or self.ties.get(slab.step.targets[i]):
            return False
        return writer.copy(slab.step.targets[i], self.reader, slab.step.sources[i], region)


def _first(slab: Slab) -> str:
    return slab.step.targets[slab.writes[0][0]]


def _lacking(trees: Mapping[str, HashTree]) -> dict[str, HashTree]:
    return {name: tree for name, tree in trees.items() if not tree.complete}
