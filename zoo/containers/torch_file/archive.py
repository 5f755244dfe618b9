"""The zip files that torch.save writes, without torch: where each storage lies, and its bytes.

A checkpoint is `NAME/data.pkl`, a pickle that refers to storages, and `NAME/data/KEY`, one
stored record for each. `zipfile` reads the central directory and nothing else: torch reads
records through their local headers, so both have to say the same.

A TorchScript archive is the same with a program beside, and the pickle is the module's attributes.

A file of stable-baselines3 is a zip whose record `policy.pth` is such a checkpoint whole.
"""

from __future__ import annotations

import io
import os
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from zoo.containers.base import fill, pread
from zoo.containers.errors import CorruptInput, UnsafeInput, UsageError
from zoo.containers.torch_file.builders import Placeholder, TensorRef
from zoo.containers.torch_file.machine import MAX_PICKLE, load
from zoo.containers.torch_file.names import shown

_MAX_DIRECTORY = 64 << 20  # bytes: some half a million records
_PIECE = 4 << 20
_SEARCHED = 100_000  # attributes of a module and of those within it
POLICY = "policy.pth"
_PROGRAM = re.compile(r"[^/]+/code/")
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_END = struct.Struct("<4s4H2LH")  # of the directory
_LOCATOR = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_AGAIN = "it is damaged or was written wrongly: copy or download it again"


@dataclass(frozen=True, slots=True)
class Record:
    """Where the bytes of a storage lie in the file, and their CRC-32 if the file has one."""

    offset: int
    size: int
    crc: int | None


def open_zip(
    fd: int, what: str, within: Record | None = None, member: str = POLICY
) -> tuple[Any, dict[str, Record], list[str]]:
    """The unpickled object of a zip file, the records of its storages by their key, and the files
    that lie beside it in one of stable-baselines3, of which `member` is read.

    `within` is where in `fd` the zip file lies; None: it is all of it.
    """
    whole = Record(0, os.fstat(fd).st_size, None)
    records = _records(fd, what, within or whole)
    if within is None and POLICY in records and not any(n.endswith("/data.pkl") for n in records):
        return _open_member(fd, what, records, member)
    roots = [name[: -len("/data.pkl")] for name in records if name.endswith("/data.pkl")]
    roots = [root for root in roots if "/" not in root]
    if len(roots) != 1:
        raise CorruptInput(
            f"{what}: a zip file with {len(roots)} records data.pkl, where torch.save writes one",
            "give a file that torch.save wrote",
        )
    prefix = f"{roots[0]}/"
    own = {n.removeprefix(prefix): r for n, r in records.items() if n.startswith(prefix)}
    if "byteorder" in own:
        order = read_span(fd, own["byteorder"], 0, min(own["byteorder"].size, 16), what).tobytes()
        if order != b"little":
            raise UsageError(
                f"{what}: its byte order is {shown(order.decode('latin-1'))}, not little",
                "load it with torch on a little-endian machine and save it again",
            )
    pickle = own["data.pkl"]
    if pickle.size > MAX_PICKLE:
        raise CorruptInput(
            f"{what}: its pickle has {pickle.size} bytes; at most {MAX_PICKLE} are read",
            "save the tensors as tensors, not as lists or NumPy arrays",
        )
    raw = read_span(fd, pickle, 0, pickle.size, f"{what}: data.pkl").tobytes()
    root = load(io.BytesIO(raw), what)
    if "constants.pkl" in own and not _has_weights(root):
        raise UsageError(
            f"{what}: a TorchScript archive without weights: a frozen one has them as constants of "
            "its program, without names",
            "give the archive that was saved before torch.jit.freeze",
        )
    storages = {n.removeprefix("data/"): r for n, r in own.items() if n.startswith("data/")}
    return root, storages, []


def _has_weights(root: Any) -> bool:
    """Whether a module, or one within it, has an attribute that is a tensor; a few steps decide."""
    pending, seen = [root], 0
    while pending and seen < _SEARCHED:
        value, seen = pending.pop(), seen + 1
        if isinstance(value, TensorRef):
            return True
        if isinstance(value, Placeholder) and isinstance(value.state, dict):
            pending += list(value.state.values())
    return bool(pending)


def _open_member(
    fd: int, what: str, records: dict[str, Record], name: str
) -> tuple[Any, dict[str, Record], list[str]]:
    """One file of stable-baselines3's; what lies beside it is named, not looked at."""
    member = records.get(name)
    if member is None:
        raise UsageError(f"{what}: it holds no {shown(name)}", f"it holds {', '.join(records)}")
    if pread(fd, min(member.size, 2), member.offset, what).tobytes() != b"PK":
        raise UsageError(
            f"{what}: its {shown(name)} is not in the zip format that torch writes since 1.6",
            f"unpack it and give {shown(name)} itself",
        )
    root, storages, _ = open_zip(fd, f"{what}: {shown(name)}", member)
    return root, storages, [other for other in records if other != name]


class _Directory(io.RawIOBase):
    """A zip file as zipfile sees it: a forged directory size must not fill the memory."""

    def __init__(self, fd: int, within: Record) -> None:
        self._fd, self._within, self._at = fd, within, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        at = offset + (0, self._at, self._within.size)[whence]
        if at < 0:
            raise OSError("before its first byte")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(0, self._within.size - self._at)
        wanted = left if size is None or size < 0 else size
        if wanted > _MAX_DIRECTORY:
            raise zipfile.BadZipFile("its directory is too long")
        found = os.pread(self._fd, min(wanted, left), self._within.offset + self._at)
        self._at += len(found)
        return found


def _records(fd: int, what: str, within: Record) -> dict[str, Record]:
    """Every record of the file by name. Refuses what could be read in two ways, or expands."""
    base = within.offset
    try:
        with _Directory(fd, within) as file, zipfile.ZipFile(file) as archive:
            infos, end = archive.infolist(), base + archive.start_dir
            _check_end(file, archive)
    except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError, IndexError) as e:
        raise CorruptInput(
            f"{what}: the zip directory cannot be read: {shown(str(e))}",
            "it is truncated or damaged: copy or download it again",
        ) from None
    # A TorchScript archive's program is not for us: it may be compressed, and is never read.
    infos = [info for info in infos if not _PROGRAM.match(info.orig_filename)]
    records: dict[str, Record] = {}
    start = base
    for info in sorted(infos, key=lambda info: info.header_offset):
        name = info.orig_filename
        if name in records:
            raise UnsafeInput(
                f"{what}: two records are named {shown(name)}, so two readers may see two files",
                "get the file from a source that you trust, or write it again with torch.save",
            )
        if base + info.header_offset < start:
            raise UnsafeInput(
                f"{what}: the record {shown(name)} overlaps another",
                "get the file from a source that you trust, or write it again with torch.save",
            )
        records[name] = _record(fd, info, base, what)
        start = records[name].offset + records[name].size
    if start > end:
        raise CorruptInput(
            f"{what}: its records reach beyond their end at byte {end - base}", _AGAIN
        )
    return records


def _check_end(file: _Directory, archive: zipfile.ZipFile) -> None:
    """BadZipFile where the end of the file says another directory than the one that is there:
    `zipfile` passes over what torch goes by."""
    at = file.seek(-_END.size - len(archive.comment), os.SEEK_END)
    _, *disks, here, total, size, start, _ = _END.unpack(file.read(_END.size))
    before = file.seek(max(0, at - _LOCATOR.size))
    magic, disk, where, count = _LOCATOR.unpack(file.read(_LOCATOR.size))
    if magic == b"PK\6\7":  # the same in 64 bits, which goes before
        at = before - _END_64.size
        if (disk, where, count) != (0, at, 1):
            raise zipfile.BadZipFile("its end lies elsewhere")
        file.seek(at)
        _, _, _, _, *disks, here, total, size, start = _END_64.unpack(file.read(_END_64.size))
    found = len(archive.infolist())
    if any(disks) or (here, total) != (found, found):
        raise zipfile.BadZipFile(f"its end says {total} records, and there are {found}")
    if (start, start + size) != (archive.start_dir, at):
        raise zipfile.BadZipFile("its end says that the directory lies elsewhere")
    for info in archive.infolist():
        if info.volume:
            raise zipfile.BadZipFile("a record of it lies on another disk")
        raw = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
        raw.decode()  # as torch does, whatever the flag


def _record(fd: int, info: zipfile.ZipInfo, base: int, what: str) -> Record:
    """Where the data of one record lies, by its local header."""
    name = info.orig_filename
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        how = "encrypted" if info.flag_bits & 1 else "compressed"
        raise UnsafeInput(
            f"{what}: the record {shown(name)} is {how}, which torch.save never does",
            "load it with torch, if you trust it, and save it again",
        )
    offset = base + info.header_offset
    raw = pread(fd, _LOCAL_HEADER.size, offset, f"{what}: {shown(name)}").tobytes()
    magic, _, flags, method, *_, name_size, extra_size = _LOCAL_HEADER.unpack(raw)
    offset += _LOCAL_HEADER.size
    raw = pread(fd, name_size, offset, f"{what}: {shown(name)}").tobytes()
    local = raw.decode("utf-8" if flags & 0x800 else "cp437", "replace")
    stored = method == zipfile.ZIP_STORED and not flags & 1
    if magic != b"PK\3\4" or local != name or not stored or info.compress_size != info.file_size:
        raise CorruptInput(
            f"{what}: the zip directory and the file disagree on the record {shown(name)}", _AGAIN
        )
    return Record(offset + name_size + extra_size, info.file_size, info.CRC)


def read_span(
    fd: int,
    record: Record,
    start: int,
    stop: int,
    what: str,
    check: bool = True,
    into: memoryview | None = None,
) -> np.ndarray:
    """Bytes `start` to `stop` of `record`, as uint8, and in `into`, where that is given; what lies
    around them is read if `check`.

    Checking reads the whole record, but never holds more of it than the span and a small piece.
    """
    span = np.empty(stop - start, np.uint8) if into is None else np.frombuffer(into, np.uint8)
    view = span.data if into is None else into
    if record.crc is None or not check:
        fill(fd, view, record.offset + start, what)
        return span
    scratch = memoryview(bytearray(min(_PIECE, record.size - len(view))))
    crc = done = 0
    while done < record.size:
        if start <= done < stop:
            piece = view[done - start : done - start + _PIECE]
        else:
            until = start if done < start < stop else record.size
            piece = scratch[: until - done]
        fill(fd, piece, record.offset + done, what)
        crc = zlib.crc32(piece, crc)
        done += len(piece)
    if crc != record.crc:
        raise CorruptInput(f"{what}: the bytes in the file are not those written (CRC-32)", _AGAIN)
    return span
