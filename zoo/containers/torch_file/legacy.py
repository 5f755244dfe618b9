"""The files that torch.save wrote before 1.6, and still writes when asked to.

Five pickles in a row: a magic number, a version, facts on the machine, the object and the keys
of its storages. Then for each key, in that order, an int64 number of elements and their bytes.
There is no checksum.
"""

from __future__ import annotations

import os
import struct
from typing import Any

from zoo.containers.base import pread
from zoo.containers.errors import CorruptInput, UsageError
from zoo.containers.torch_file.archive import Record
from zoo.containers.torch_file.builders import PickleError, StorageRef
from zoo.containers.torch_file.machine import MAX_PICKLE, load
from zoo.containers.torch_file.names import STORAGES, shown

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_AHEAD = 1 << 16  # bytes; also the longest line that a text opcode may have
_ITEMSIZES = dict(STORAGES.values())
_AGAIN = "it is truncated, damaged or no checkpoint: copy or download it again"


class _Source:
    """A file's first bytes for `pickletools`, which asks for as many as the file claims."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._end = min(os.fstat(fd).st_size, MAX_PICKLE)
        self._ahead = b""
        self._at = 0  # in _ahead
        self._next = 0  # in the file, behind _ahead

    def tell(self) -> int:
        return self._next - len(self._ahead) + self._at

    def _have(self, size: int) -> None:
        """Make `size` bytes ready, or as many as there are."""
        missing = min(size, self._end - self.tell()) - (len(self._ahead) - self._at)
        if missing > 0:
            missing = min(max(missing, _AHEAD), self._end - self._next)
            more = pread(self._fd, missing, self._next, "pickle").tobytes()
            self._ahead = self._ahead[self._at :] + more
            self._at = 0
            self._next += missing

    def read(self, size: int, /) -> bytes:
        self._have(size)
        found = self._ahead[self._at : self._at + size]
        self._at += len(found)
        return found

    def readline(self) -> bytes:
        self._have(_AHEAD)
        newline = self._ahead.find(b"\n", self._at, self._at + _AHEAD)
        if newline < 0:
            raise PickleError("a line does not end")
        return self.read(newline + 1 - self._at)


def open_legacy(fd: int, what: str) -> tuple[Any, dict[str, Record]]:
    """The unpickled object of a file, and where the storages lie, by their key."""
    source = _Source(fd)
    if load(source, what) != _MAGIC:
        raise CorruptInput(
            f"{what}: neither a zip file nor one that starts with torch's magic number",
            "give a file that torch.save wrote; load other pickles with what wrote them",
        )
    version, system = load(source, what), load(source, what)
    if version != _VERSION or not isinstance(system, dict):
        raise CorruptInput(f"{what}: not of torch's protocol version {_VERSION}", _AGAIN)
    if system.get("little_endian") is False:
        raise UsageError(
            f"{what}: its byte order is big, not little",
            "load it with torch on a little-endian machine and save it again",
        )
    blocks: dict[str, StorageRef] = {}
    root = load(source, what, blocks)
    keys = load(source, what)
    if not isinstance(keys, list):
        raise CorruptInput(f"{what}: the list of its storages is missing", _AGAIN)
    return root, _records(fd, source.tell(), keys, blocks, what)


def _records(
    fd: int, offset: int, keys: list[Any], blocks: dict[str, StorageRef], what: str
) -> dict[str, Record]:
    size = os.fstat(fd).st_size
    records: dict[str, Record] = {}
    for listed in keys:
        key = str(listed) if type(listed) in (str, int) else ""
        if key not in blocks or key in records:
            raise CorruptInput(f"{what}: its list of storages does not fit its object", _AGAIN)
        name = f"{what}: storage {shown(key)}"
        (count,) = struct.unpack("<q", pread(fd, 8, offset, name).tobytes())
        offset += 8
        block = blocks[key]
        if count * _ITEMSIZES[block.dtype] != block.total:
            raise CorruptInput(
                f"{name} should have {block.total} bytes of {block.dtype}, not {count} elements",
                _AGAIN,
            )
        if offset + block.total > size:
            raise CorruptInput(
                f"{name} ends {offset + block.total - size} bytes beyond the file",
                "it is truncated: copy or download it again",
            )
        records[key] = Record(offset, block.total, None)
        offset += block.total
    return records
