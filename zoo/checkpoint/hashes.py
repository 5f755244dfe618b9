"""Hashes of tensors, as certificates of format 2 have them: a tree, so that the parts of a tensor
are hashed in any order and at once.

A tensor's bytes, row-major, are cut into leaves: the largest boxes of at most 1 MiB that lie
contiguously (`zoo.containers.regions.blocks`). The hash of a tensor of one leaf is that of its
bytes; of more, that of b"zooconvert leaves\\0" and the leaves' digests in order.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from zoo.containers import dtypes
from zoo.containers.base import TensorInfo
from zoo.containers.errors import MissingExtra
from zoo.containers.regions import Region, blocks, runs, tiles, whole

LEAF = 1 << 20  # bytes
_INNER = b"zooconvert leaves\0"
_PIECE = 1 << 20


def best() -> str:
    """The kind of hash that is made here: "blake3", or "sha256" where that is not installed."""
    return "blake3" if find_spec("blake3") else "sha256"


def hasher(kind: str) -> Any:
    """A hash object of the kind. MissingExtra, ValueError for a kind that is not known."""
    if kind == "sha256":
        return hashlib.sha256()
    if kind != "blake3":
        raise ValueError(f"there is no hash {kind!r}")
    try:
        from blake3 import blake3
    except ImportError:
        raise MissingExtra("a certificate with BLAKE3 hashes", "blake3") from None
    return blake3()


def digest(kind: str, data: Any) -> bytes:
    """Of a buffer of bytes."""
    made = hasher(kind)
    made.update(data)
    value: bytes = made.digest()
    return value


def leaf(info: TensorInfo) -> tuple[int, ...]:
    """The shape of a tensor's leaves; the last of an axis may be shorter."""
    return blocks(info.shape, LEAF // dtypes.itemsize(info.dtype))


class HashTree:
    """The hash of one tensor in the making: its leaves come in any order."""

    def __init__(self, kind: str, info: TensorInfo) -> None:
        self.kind, self.info = kind, info
        self._leaf = leaf(info)
        self._grid = [-(-n // max(1, b)) for n, b in zip(info.shape, self._leaf, strict=True)]
        self._digests: list[bytes | None] = [None] * math.prod(self._grid) if info.size else []

    @property
    def complete(self) -> bool:
        """Whether every leaf is there."""
        return None not in self._digests

    def holds(self, region: Region) -> bool:
        """Whether the region consists of whole leaves that lie one after the other."""
        length, starts = runs(self.info.shape, region)
        if length and len(list(itertools.islice(starts, 2))) > 1:
            return False
        axes = zip(region, self._leaf, self.info.shape, strict=True)
        return all(s.start % b == 0 and (s.stop % b == 0 or s.stop == n) for s, b, n in axes if n)

    def leaves(self, region: Region) -> Iterator[tuple[int, Region]]:
        """The number of each leaf of such a region, and where it is within the region."""
        if not self.info.size:
            return
        for part in tiles(self.info.shape, self._leaf, region):
            number = 0
            for s, b, n in zip(part, self._leaf, self._grid, strict=True):
                number = number * n + s.start // b
            inside = zip(part, region, strict=True)
            yield number, tuple(slice(s.start - r.start, s.stop - r.start) for s, r in inside)

    def put(self, number: int, value: bytes) -> None:
        """The digest of one leaf."""
        self._digests[number] = value

    def leaf(self, number: int) -> bytes:
        """The digest of one leaf that is there."""
        found = self._digests[number]
        assert found is not None
        return found

    def differs(self, number: int, value: bytes) -> bool:
        """Whether the leaf has another digest."""
        return self._digests[number] != value

    def hexdigest(self) -> str:
        """The tensor's hash, once it is complete."""
        found = [d for d in self._digests if d is not None]
        if len(found) != len(self._digests):
            raise ValueError("not every leaf was hashed")
        if len(found) == 1:
            return found[0].hex()
        return digest(self.kind, _INNER + b"".join(found) if found else b"").hex()


def of(kind: str, array: np.ndarray) -> str:
    """The hash of an array."""
    tree = HashTree(kind, TensorInfo(dtypes.code_of(array.dtype), array.shape))
    for number, part in tree.leaves(whole(array.shape)):
        tree.put(number, digest(kind, in_order(array[part])))
    return tree.hexdigest()


def in_order(array: np.ndarray) -> memoryview:
    """The bytes of a C-contiguous array that has elements."""
    view: memoryview = array.reshape(-1).view(np.uint8).data
    return view


def rest(kind: str, path: Path, spans: Iterable[tuple[int, int]]) -> str:
    """The hash of what a file holds outside these stretches, each an offset and a length: of its
    headers, or of all of it where there are none."""
    made = hasher(kind)
    with path.open("rb") as file:
        at, size = 0, os.fstat(file.fileno()).st_size
        for start, length in [*sorted(s for s in spans if s[1]), (size, 0)]:
            while at < start:
                data = os.pread(file.fileno(), min(_PIECE, start - at), at)
                if not data:
                    break
                made.update(data)
                at += len(data)
            at = max(at, start + length)
    found: str = made.hexdigest()
    return found
