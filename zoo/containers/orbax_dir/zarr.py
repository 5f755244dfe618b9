"""The arrays inside an Orbax checkpoint: zarr v2 or v3, in plain files or in an OCDBT database.

TensorStore reads and writes the elements. What an array claims to be is parsed here first, for
two reasons: a header is wanted without opening every array, and TensorStore aborts the process
where a few bytes of JSON claim more memory than there is. The specs that it is given are built
here too; nothing but the array's own metadata is ever taken from a file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from zoo.containers import dtypes
from zoo.containers.base import TensorInfo
from zoo.containers.errors import CorruptInput, MissingExtra, NoSpace, ZooError
from zoo.containers.regions import blocks, size, tiles

# Orbax's own settings: the nodes of OCDBT's tree are cached, the data are not.
CONTEXT = {
    "cache_pool#ocdbt": {"total_bytes_limit": 100_000_000},
    "file_io_concurrency": {"limit": 128},
}

AGAIN = "it is damaged or was not completely written: copy, download or save it again"

# An array may claim this much however little lies on disk, and beyond it this many times what
# lies there. A zstd block of 4 bytes yields at most 128 KiB, 32768 times its size, and Orbax's
# all-zero arrays (fresh optimizer moments) do come to 1 : 28500.
_FREE = 64 << 20
_MOST = 40_000
_MOST_CHUNKS = 1 << 20

_CHUNK_NAME = re.compile(r"c|(c\.)?\d+(\.\d+)*")

T = TypeVar("T")

_ZARR2 = {
    "f8": "F64",
    "f4": "F32",
    "f2": "F16",
    "c8": "C64",
    "c16": "C128",
    "i8": "I64",
    "i4": "I32",
    "i2": "I16",
    "i1": "I8",
    "u8": "U64",
    "u4": "U32",
    "u2": "U16",
    "u1": "U8",
    "b1": "BOOL",
}


@dataclass(frozen=True, slots=True)
class ZarrArray:
    """One array's header, and the shape of the chunks that it is stored in."""

    info: TensorInfo
    chunks: tuple[int, ...]
    # What stands between the numbers in the chunks' names, where they hold the elements row-major
    # and as they are, and each chunk lies contiguously in the array; else None.
    plain: str | None = None


def tensorstore() -> ModuleType:
    """The module tensorstore, or MissingExtra."""
    try:
        import tensorstore
    except ImportError:
        raise MissingExtra("an Orbax checkpoint", "orbax") from None
    module: ModuleType = tensorstore
    return module


def parse(raw: bytes, zarr3: bool, disk: int, what: str) -> ZarrArray:
    """The header in `.zarray` (v2) or `zarr.json` (v3); `disk` bytes lie behind it at most.

    Raises CorruptInput for what is not an array of a dtype that we carry, or claims too much.
    """
    meta = load_json(raw, what)
    dtype, shape, chunks = _fields3(meta) if zarr3 else _fields2(meta)
    if dtype is None:
        raise CorruptInput(
            f"{what}: has dtype {meta.get('data_type' if zarr3 else 'dtype')!r}, "
            "which this version does not carry",
            f"known are {' '.join(dtypes.NUMPY)}",
        )
    sizes = _sizes(shape, 0), _sizes(chunks, 1)
    if sizes[0] is None or sizes[1] is None or len(sizes[0]) != len(sizes[1]):
        raise CorruptInput(f"{what}: has the shape {shape!r} in chunks of {chunks!r}", AGAIN)
    array = ZarrArray(TensorInfo(dtype, sizes[0]), sizes[1])
    _check_claims(array, disk, what)
    return replace(array, plain=_plain(meta, array, disk)) if zarr3 else array


def _plain(meta: dict[str, Any], array: ZarrArray, disk: int) -> str | None:
    pairs = zip(array.info.shape, array.chunks, strict=True)
    stored = math.prod(-(-size // chunk) * chunk for size, chunk in pairs)
    if stored * dtypes.itemsize(array.info.dtype) > disk:  # before anything is listed
        return None
    match meta.get("codecs"):
        case [{"name": "bytes", "configuration": {"endian": "little"}}]:
            pass
        case [{"name": "bytes"}] if dtypes.itemsize(array.info.dtype) == 1:
            pass
        case _:
            return None
    contiguous = blocks(array.info.shape, math.prod(array.chunks)) == array.chunks
    match meta.get("chunk_key_encoding"):
        case {"name": "default", "configuration": {"separator": ("." | "/") as separator}}:
            return separator if contiguous else None
        case {"name": "default", **rest} if not rest.get("configuration"):
            return "/" if contiguous else None
    return None


def chunk_files(array: ZarrArray) -> list[tuple[str, int]]:
    """Of a plain array: the name of each chunk's file below the array's directory, and how many of
    its bytes are elements of the array. At the edge a chunk is filled up with others."""
    itemsize = dtypes.itemsize(array.info.dtype)
    found = []
    for tile in tiles(array.info.shape, array.chunks):
        at = (str(s.start // n) for s, n in zip(tile, array.chunks, strict=True))
        found.append(((array.plain or "").join(["c", *at]), size(tile) * itemsize))
    return found


def _fields2(meta: dict[str, Any]) -> tuple[str | None, Any, Any]:
    stored = meta.get("dtype")
    if not isinstance(stored, str):
        return None, None, None
    code = _ZARR2.get(stored[1:]) if stored[:1] in "<>|" else dtypes.FROM_NAME.get(stored)
    return code, meta.get("shape"), meta.get("chunks")


def _fields3(meta: dict[str, Any]) -> tuple[str | None, Any, Any]:
    stored, chunks = meta.get("data_type"), None
    match meta.get("chunk_grid"):
        case {"name": "regular", "configuration": {"chunk_shape": chunks}}:
            pass
    code = dtypes.FROM_NAME.get(stored) if isinstance(stored, str) else None
    return code, meta.get("shape"), chunks


def _sizes(value: Any, least: int) -> tuple[int, ...] | None:
    if isinstance(value, list) and all(type(n) is int and n >= least for n in value):
        return tuple(value)
    return None


def _check_claims(array: ZarrArray, disk: int, what: str) -> None:
    chunk = math.prod(array.chunks) * dtypes.itemsize(array.info.dtype)
    claimed = max(array.info.nbytes, chunk)
    if claimed > max(_FREE, _MOST * disk):
        raise CorruptInput(
            f"{what}: claims {claimed} bytes, on disk lie {disk}",
            "no checkpoint compresses so well: do not trust it, or copy or download it again",
        )
    pairs = zip(array.info.shape, array.chunks, strict=True)
    count = math.prod(-(-size // chunk) for size, chunk in pairs)
    if count > _MOST_CHUNKS:
        raise CorruptInput(f"{what}: claims {count} chunks", AGAIN)


def is_array(folder: Path) -> bool:
    """Whether a folder of a checkpoint holds arrays and nothing else."""
    files = [p for p in folder.rglob("*") if not p.is_dir()] if folder.is_dir() else []
    heads = [p for p in files if p.name in ("zarr.json", ".zarray")]
    return bool(heads) and all(p in heads or _CHUNK_NAME.fullmatch(p.name) for p in files)


def load_json(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object in which no name stands twice (another parser might take the other one)."""
    try:
        value = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as e:
        raise CorruptInput(f"{what}: cannot be read as JSON: {one_line(e)}", AGAIN) from None
    if not isinstance(value, dict):
        raise CorruptInput(f"{what}: is not a JSON object", AGAIN)
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return result


def wrong_name(keys: Sequence[str]) -> str | None:
    """Why the leaf at `keys` can have no place in a checkpoint; None where it can.

    Without OCDBT the joined keys are a path below the checkpoint, which must stay below it.
    """
    name = ".".join(keys)
    if "\0" in name:
        return "holds a NUL"
    if name.startswith("/"):
        return "is an absolute path"
    parts = name.split("/")
    if ".." in parts or any(".." in key.split("/") for key in keys):
        return "leaves its directory"
    if "" in parts or "." in parts:
        return "is not a path"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "is not valid Unicode"
    return None


def one_line(error: BaseException) -> str:
    """An error's message without TensorStore's source locations, short enough for one line."""
    text = re.sub(
        r"\s*\[(?:source locations|tensorstore_spec|domain|transform)=.*",
        "",
        str(error),
        flags=re.S,
    )
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "..."


def guarded(
    work: Callable[[], T], what: str, kind: type[ZooError] = CorruptInput, advice: str = AGAIN
) -> T:
    """`work()`, with whatever TensorStore raises as `kind` (or NoSpace), naming `what`."""
    try:
        return work()
    except MemoryError:
        raise kind(f"{what}: needs more memory than there is", advice) from None
    except Exception as e:  # TensorStore maps its codes to ValueError, RuntimeError and others
        if "No space left on device" in str(e):
            raise NoSpace(f"{what}: the disk is full", "free some space, or write elsewhere") from e
        raise kind(f"{what}: {one_line(e)}", advice) from e
