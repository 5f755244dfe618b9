"""A plan cut into slabs: parts of tensors that are read, moved and written within a fixed memory.

A slab is driven by its source: a box of it, contiguous where that is possible, so that a source is
read from front to back and hashed on the way; what it becomes is a box of a target, or several.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from zoo.checkpoint.hashes import leaf
from zoo.checkpoint.plan import Step
from zoo.containers import dtypes
from zoo.containers.base import TensorInfo
from zoo.containers.regions import Region, blocks, size, tiles, whole
from zoo.layout.cuts import Need, assemble, needed
from zoo.layout.ops import Flip, Ops, Permute, Shape

MEMORY = 96_000_000  # bytes of tensors that are held at a time, unless told otherwise
COPIED = 4 << 20  # bytes of a slab of what is only copied: it stays in the cache
_SHORT = 8 << 10  # bytes: to write fewer of them at a time costs much more than to read them so
_SPARE = 2 << 20  # bytes a worker takes besides its slab


@dataclass(frozen=True, slots=True)
class Slab:
    """What is read at a time, and what that becomes."""

    step: Step
    reads: tuple[Need, ...]  # which of the step's sources, and the region of it
    writes: tuple[Need, ...]  # the same of its targets

    @property
    def nbytes(self) -> int:
        """Bytes read."""
        return sum(size(r) * _itemsize(self.step.source_infos[i]) for i, r in self.reads)

    @property
    def held(self) -> int:
        """Bytes that it takes at the peak, most of them in a buffer that the next one has again."""
        own = self.nbytes * (1 if _is_view(self.step) else 2)
        return own + min(own, _SPARE)

    @property
    def is_cast(self) -> bool:
        """Whether its values are rounded on the way."""
        return is_cast(self.step)

    @property
    def is_copy(self) -> bool:
        """Whether its bytes stay as they are, in the order in which they are."""
        return not self.step.ops and not self.is_cast


def default_workers() -> int:
    """Threads that take slabs at once, unless told otherwise."""
    return max(2, min(4, os.cpu_count() or 1))


def cut(steps: Sequence[Step], memory: int | None, workers: int) -> list[Slab]:
    """The slabs of the steps, in their order. `memory` bytes are enough for as many at a time as
    there are workers, where the ops allow it; None: a slab for every step."""
    room = None if memory is None else max(_SPARE, memory // workers - _SPARE)
    return [slab for step in steps for slab in _slabs(step, room)]


def held(slabs: Sequence[Slab], workers: int) -> int:
    """Bytes of tensors that are held at the peak."""
    return sum(sorted((slab.held for slab in slabs), reverse=True)[:workers])


def is_cast(step: Step) -> bool:
    """Whether a step's values are rounded on the way."""
    return step.source_infos[0].dtype != step.target_infos[0].dtype


def _slabs(step: Step, room: int | None) -> Iterator[Slab]:
    wholes = [tuple((i, whole(n.shape)) for i, n in enumerate(s)) for s in _infos(step)]
    everything = Slab(step, wholes[0], wholes[1])
    if room is None:
        yield everything
    elif everything.is_copy:
        for (i, _), info in zip(everything.reads, step.source_infos, strict=True):
            for region in contiguous(info, min(room, COPIED)):
                yield Slab(step, ((i, region),), ((i, region),))
    elif everything.held <= room + _SPARE:
        yield everything
    else:
        parts = [_parts(step, i, room) for i in range(len(step.sources))]
        if any(part is None for part in parts):
            yield everything  # no box of a source is a box of the target: it takes more memory
        for part in parts:
            yield from (part or () if None not in parts else ())


def _parts(step: Step, source: int, room: int) -> list[Slab] | None:
    """The slabs of one source that each become boxes of targets; contiguous ones, if there are any
    such; None where there are none along any axis."""
    info = step.source_infos[source]
    room = room if _is_view(step) else room // 2
    candidates = [contiguous(info, room)]
    for axis, n in enumerate(info.shape):
        block = list(info.shape)
        block[axis] = max(1, room // max(1, info.nbytes // max(1, n)))
        candidates.append(tiles(info.shape, block))
    rows = candidates[0][0][0]
    if _is_transposed(step) and (rows.stop - rows.start) * _itemsize(info) < _SHORT:
        ours = contiguous(step.target_infos[0], room)  # short reads cost less than short writes
        candidates.insert(0, [region[::-1] for region in ours])
    for regions in candidates:
        slabs = [_exact(step, source, region) for region in regions]
        if None not in slabs:
            return [s for s in slabs if s is not None]
    return None


def _exact(step: Step, source: int, region: Region) -> Slab | None:
    """The slab of a region, if what it becomes is made of it and nothing else."""
    shapes = [[n.shape for n in infos] for infos in _infos(step)]
    writes = needed(step.back, shapes[1], source, region)
    if sum(size(r) for _, r in writes) != size(region):
        return None
    for t, part in writes:
        for i, box in needed(step.ops, shapes[0], t, part):
            if i != source or not _inside(box, region):
                return None
    return Slab(step, ((source, region),), tuple(writes))


def contiguous(info: TensorInfo, room: int) -> list[Region]:
    """Boxes of at most `room` bytes that lie contiguously, each of whole leaves of the hash; a
    tensor without elements is one."""
    if not info.size:
        return [whole(info.shape)]
    block = list(blocks(info.shape, max(1, room // _itemsize(info))))
    leaves = leaf(info)
    axis = next((a for a, n in enumerate(block) if n > 1), len(block) - 1)
    if block and block[axis] < info.shape[axis] and block[axis + 1 :] == list(leaves[axis + 1 :]):
        block[axis] = max(1, block[axis] // leaves[axis]) * leaves[axis]
    return tiles(info.shape, block)


def pieces(
    ops: Ops, infos: Sequence[TensorInfo], parts: Sequence[tuple[Need, np.ndarray]], wanted: Need
) -> np.ndarray:
    """The region `wanted` of the ops' outputs, a view where possible, of parts of their inputs."""
    shapes: list[Shape] = [n.shape for n in infos]

    def read(i: int, region: Region) -> np.ndarray:
        for (j, box), array in parts:
            if i == j and _inside(region, box):
                at = zip(region, box, strict=True)
                return array[tuple(slice(s.start - b.start, s.stop - b.start) for s, b in at)]
        raise LookupError(f"{region} of input {i} was not read")

    return assemble(ops, shapes, *wanted, read)


def _infos(step: Step) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    return step.source_infos, step.target_infos


def _is_view(step: Step) -> bool:
    """Whether NumPy moves the elements without a copy of its own, there and back."""
    return all(isinstance(op, Permute | Flip) for op in step.ops) and not is_cast(step)


def _is_transposed(step: Step) -> bool:
    """Whether it is one matrix, transposed."""
    return list(step.ops) == [Permute((1, 0))] and not is_cast(step)


def _inside(region: Region, box: Region) -> bool:
    pairs = zip(region, box, strict=True)
    return all(b.start <= s.start and s.stop <= b.stop for s, b in pairs)


def _itemsize(info: TensorInfo) -> int:
    return dtypes.itemsize(info.dtype)
