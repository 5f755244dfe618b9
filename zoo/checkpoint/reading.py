"""Reading tensors in parts, in several threads: into buffers that are used again, or for hashes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from zoo.checkpoint.ahead import prefetch
from zoo.checkpoint.hashes import HashTree, digest, in_order
from zoo.checkpoint.slabs import COPIED, contiguous
from zoo.containers import dtypes
from zoo.containers.base import Reader
from zoo.containers.errors import ZooError
from zoo.containers.regions import Region, extent, size
from zoo.containers.scratch import Scratch
from zoo.layout.cuts import Need


class Buffers:
    """A buffer for each thread, which keeps its pages from one slab to the next."""

    def __init__(self) -> None:
        self._scratch = Scratch()

    def read(
        self, reader: Reader, named: Sequence[tuple[str, Need]]
    ) -> list[tuple[Need, np.ndarray]]:
        """Regions of these tensors, valid until this thread reads the next ones."""
        infos = [reader.tensors[name] for name, _ in named]
        lengths = [
            size(r) * dtypes.itemsize(n.dtype) for n, (_, (_, r)) in zip(infos, named, strict=True)
        ]
        starts = [sum(n + -n % 64 for n in lengths[:i]) for i in range(len(lengths) + 1)]
        buffer = self._scratch.least(starts[-1])
        found = []
        for (name, need), info, start, n in zip(named, infos, starts, lengths, strict=False):
            out = buffer[start : start + n].view(dtypes.NUMPY[info.dtype]).reshape(extent(need[1]))
            found.append((need, reader.read(name, need[1], out)))
        return found


def hashed(
    reader: Reader, trees: Mapping[str, HashTree], workers: int
) -> Iterator[tuple[str, int, ZooError | None]]:
    """Fill the trees from the tensors of these names; gives after each part the name, the bytes
    read, and what was wrong."""
    buffers = Buffers()

    def part(name: str, region: Region) -> tuple[str, int, ZooError | None]:
        try:
            ((_, array),) = buffers.read(reader, [(name, (0, region))])
        except ZooError as e:
            return name, 0, e
        hash_leaves(trees[name], region, array)
        return name, array.nbytes, None

    parts = [(n, r) for n, tree in trees.items() for r in contiguous(tree.info, COPIED)]
    return prefetch([functools.partial(part, n, r) for n, r in parts], workers)


def hash_leaves(tree: HashTree, region: Region, array: np.ndarray) -> None:
    """Fill in the leaves of a region that holds whole ones, whose elements `array` has."""
    for number, at in tree.leaves(region):
        tree.put(number, digest(tree.kind, in_order(array[at])))
