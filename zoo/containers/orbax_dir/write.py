"""Writing an Orbax checkpoint, one tensor at a time. See `OrbaxWriter`."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from zoo.containers import dtypes
from zoo.containers.base import TensorInfo, fsync, put
from zoo.containers.errors import UsageError
from zoo.containers.filenames import ORBAX_CHECKPOINT, ORBAX_COMMITTED, ORBAX_TREE
from zoo.containers.orbax_dir.zarr import ZarrArray, chunk_files, wrong_name
from zoo.containers.regions import blocks
from zoo.containers.spans import Span, SpanWriter

_CHUNK = 16 << 20
_AT_ONCE = 2  # arrays that are made, or files that are flushed, at a time
_NAME = 255  # bytes that a directory's name may have


class OrbaxWriter(SpanWriter):
    """One tree of arrays in the directory `path`, names split at their dots into nested dicts.

    The layout is the flat one: `_METADATA` and a directory for each array in `path` itself. Given
    only the path, Orbax 0.12 restores it by v1 `load`, `load_pytree` and `metadata` and by v0
    `StandardCheckpointer` and `PyTreeCheckpointer`. The layout of v1's own `save` (a marker
    file and `state/`) is refused by both v0 checkpointers, and all that it has over this one is
    v1 `load_checkpointables`. Files put beside it (a config) disturb none of them.

    Arrays are zarr v3, as v1 writes them, in plain files and not in an OCDBT database: Orbax
    restores 60 arrays of 4 MiB in 0.15 to 0.5 s from either, and nothing is copied twice. Chunks
    are uncompressed, lie contiguously in their array and hold at most 16 MiB, so that regions are
    written and read where they lie, without TensorStore. Leaves are marked as NumPy's: without a
    target tree they come back as NumPy arrays, and a 64-bit one is not cut to 32 bits by a JAX
    without x64. Orbax's zstd would take 8 % off float weights and two to three times as long.
    """

    container: ClassVar[str] = "orbax"

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, TensorInfo],
        metadata: Mapping[str, str],
        resumed: bool = False,
    ) -> None:
        super().__init__(path, tensors, metadata)
        _check(self.tensors)
        self._started = time.time_ns()
        path.mkdir(exist_ok=resumed)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            jobs = [pool.submit(self._make, n, info, resumed) for n, info in self.tensors.items()]
        self._spans = dict(zip(self.tensors, [job.result() for job in jobs], strict=True))

    def _make(self, name: str, info: TensorInfo, resumed: bool) -> list[Span]:
        """The directory of an array, with its files."""
        itemsize = dtypes.itemsize(info.dtype)
        array = ZarrArray(info, blocks(info.shape, _CHUNK // itemsize), ".")
        folder = self.path / name
        folder.mkdir(parents=True, exist_ok=resumed)
        _create(folder / "zarr.json", json.dumps(_zarr(array)).encode(), 0, resumed)
        spans = []
        for file, nbytes in chunk_files(array):
            _create(folder / file, b"", math.prod(array.chunks) * itemsize, resumed)
            spans.append(Span(0, nbytes, f"{name}/{file}"))
        return spans

    def _complete(self) -> None:
        paths = sorted(tuple(name.split(".")) for name in self.tensors)
        tree = {
            "tree_metadata": {str(path): _leaf(path) for path in paths},
            "use_ocdbt": False,
            "use_zarr3": True,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        checkpoint = {
            "item_handlers": "orbax.checkpoint._src.handlers.standard_checkpoint_handler."
            "StandardCheckpointHandler",
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": self._started,
            "commit_timestamp_nsecs": time.time_ns(),
            "custom_metadata": dict(sorted(self.metadata.items())),
        }
        (self.path / ORBAX_TREE).write_text(json.dumps(tree))
        (self.path / ORBAX_CHECKPOINT).write_text(json.dumps(checkpoint))

    def sync(self) -> None:
        _sync(self.path)
        (self.path / ORBAX_COMMITTED).write_text("Checkpoint commit was successful")
        fsync(self.path / ORBAX_COMMITTED)
        fsync(self.path)


def _create(path: Path, head: bytes, nbytes: int, resumed: bool) -> None:
    """A file of so many bytes, or as many as it begins with; `resumed`: it may be there already.
    In few calls: there are two files for every array."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | (0 if resumed else os.O_EXCL), 0o666)
    try:
        put(fd, head, 0)
        os.truncate(fd, max(nbytes, len(head)))
    finally:
        os.close(fd)


def _zarr(array: ZarrArray) -> dict[str, Any]:
    """An array's `zarr.json`."""
    numpy = dtypes.NUMPY[array.info.dtype]
    endian = {"configuration": {"endian": "little"}} if numpy.itemsize > 1 else {}
    zero = {"b": False, "c": [0.0, 0.0]}.get(numpy.kind, 0)
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": array.info.shape,
        "data_type": numpy.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": array.chunks}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": array.plain}},
        "fill_value": zero,
        "codecs": [{"name": "bytes", **endian}],
    }


def _check(tensors: Mapping[str, TensorInfo]) -> None:
    """Raises UsageError for all that Orbax cannot hold, together."""
    above = {name[:i] for name in tensors for i, c in enumerate(name) if c in "./"}
    problems = []
    for name, info in tensors.items():
        if info.size == 0:
            problems.append(f"{name}: its shape {info.shape} has no elements")
        if reason := wrong_name(name.split(".")):
            problems.append(f"{name}: as a path the name {reason}")
        if any(len(part.encode(errors="replace")) > _NAME for part in name.split("/")):
            problems.append(f"{name}: the name has more than {_NAME} bytes, and is a directory's")
        if name in above:
            problems.append(f"{name}: other names go on from it, and a tree's leaf has no branches")
    if problems or not tensors:
        raise UsageError(
            f"Orbax cannot hold {'these tensors' if problems else 'a tree without tensors'}",
            "write msgpack or safetensors instead",
            problems,
        )


def _leaf(path: tuple[str, ...]) -> dict[str, Any]:
    return {
        "key_metadata": [{"key": key, "key_type": 2} for key in path],  # 2: a key of a dict
        "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
    }


def _sync(path: Path) -> None:
    """Flush every file and directory to the disk, several at a time: a journal commits them
    together."""
    every = [Path(folder, file) for folder, _, files in os.walk(path) for file in (*files, "")]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for done in [pool.submit(fsync, one) for one in every]:
            done.result()
    fsync(path.absolute().parent)
