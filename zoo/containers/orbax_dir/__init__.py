"""Orbax: a directory with trees of arrays, which TensorStore reads and writes.

Read are the layouts of both of Orbax's APIs: one tree in the directory itself (`_METADATA`
beside the data), several named items in subdirectories (`_CHECKPOINT_METADATA` above them), and
a CheckpointManager's root with numbered steps. Neither JAX nor Orbax is imported.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from zoo.containers import dtypes
from zoo.containers.errors import CorruptInput, UnsafeInput
from zoo.containers.filenames import (
    ORBAX_CHECKPOINT,
    ORBAX_MANIFEST,
    ORBAX_TREE,
)
from zoo.containers.orbax_dir.directory import (
    bytes_below,
    is_checkpoint,
    is_orbax,
    read_json,
    read_small,
    steps_in,
    survey,
    trees_in,
    unfinished,
)
from zoo.containers.orbax_dir.write import OrbaxWriter
from zoo.containers.orbax_dir.zarr import (
    AGAIN,
    CONTEXT,
    ZarrArray,
    chunk_files,
    guarded,
    parse,
    tensorstore,
    wrong_name,
)
from zoo.containers.regions import Region, extent, whole
from zoo.containers.spans import Span, SpanReader

__all__ = ["OrbaxReader", "OrbaxWriter", "is_orbax"]

_STRINGS = "_strings.json"
_EMPTY: dict[str, Any] = {"None": None, "Dict": {}, "List": [], "Tuple": (), "NamedTuple": ()}


class OrbaxReader(SpanReader):
    """An Orbax checkpoint; of a CheckpointManager's root its latest complete step.

    A tensor's name is its tree path joined with dots. Where several items hold tensors
    (`params/`, `opt_state/`), the item's name comes first. Numbers, strings, None and empty
    containers of the tree are `extras`.
    """

    container: ClassVar[str] = "orbax"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        checkpoint = self._choose()
        disk = survey(checkpoint, path.resolve())
        trees = [checkpoint] if (checkpoint / ORBAX_TREE).exists() else trees_in(checkpoint)
        if not trees:
            missing = ORBAX_TREE if (checkpoint / ORBAX_MANIFEST).exists() else "tree of arrays"
            raise CorruptInput(f"{checkpoint}: the checkpoint has no {missing}", AGAIN)
        items = [_Tree(tree, disk) for tree in trees]
        holding = [item for item in items if item.arrays]
        self._source: dict[str, tuple[_Tree, str]] = {}
        for item in items:
            alone = holding == [item] or len(items) == 1
            self._add(item, "" if alone else f"{item.path.name}.")
        if checkpoint not in trees:
            self.notices += [
                f"item {child.name} is not a tree of arrays and was left out"
                for child in sorted(checkpoint.iterdir())
                if child.is_dir() and child not in trees
            ]
        if (checkpoint / ORBAX_CHECKPOINT).exists():
            self.metadata |= _strings(
                read_json(checkpoint / ORBAX_CHECKPOINT).get("custom_metadata")
            )

    def _choose(self) -> Path:
        """The checkpoint at `path`, or its latest complete step; refuses an unfinished one."""
        if not self.path.is_dir():
            raise CorruptInput(
                f"{self.path}: is not a directory", "give the checkpoint's directory"
            )
        if is_checkpoint(self.path):
            if reason := unfinished(self.path):
                raise CorruptInput(
                    f"{self.path}: the checkpoint is incomplete: {reason}",
                    "its writer was interrupted: take another one or save it again",
                )
            return self.path
        steps = steps_in(self.path)
        complete = [step for step in steps if not unfinished(step)]
        if not complete:
            what = "none of its steps is complete" if steps else "holds no Orbax checkpoint"
            raise CorruptInput(f"{self.path}: {what}", "give another directory or save it again")
        chosen = complete[-1]
        names = ", ".join(step.name for step in complete)
        self.notices.append(f"took step {chosen.name}, the latest of: {names}")
        if dropped := [step.name for step in steps if step not in complete]:
            self.notices.append(f"incomplete steps: {', '.join(dropped)}")
        return chosen

    def _add(self, item: _Tree, prefix: str) -> None:
        self.metadata |= item.metadata
        for name, array in item.arrays.items():
            self.tensors[prefix + name] = array.info
            if spans := item.spans(name, self.path):
                self._spans[prefix + name] = spans
            self._source[prefix + name] = item, name
        for name, value in item.extras.items():
            self.extras[prefix + name] = value

    def read(
        self, name: str, region: Region | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        if name in self._spans:
            return super().read(name, region, out)
        item, stored = self._source[name]
        return item.read(stored, region, out)

    def state(self) -> object:
        files = sorted(Path(top, f) for top, _, names in os.walk(self.path) for f in names)
        found = [(str(f), f.stat()) for f in files]
        return [(name, status.st_size, status.st_mtime_ns) for name, status in found]


class _Tree:
    """One directory with a tree of arrays: its header, and how to read an array of it."""

    def __init__(self, path: Path, disk: int) -> None:
        self.path = path
        self.arrays: dict[str, ZarrArray] = {}
        self.extras: dict[str, Any] = {}
        meta = read_json(path / ORBAX_TREE)
        self._zarr3 = meta.get("use_zarr3") is True
        # Orbax has TensorStore write chunks of zeros like any other and notes it here, so an
        # absent chunk is a lost one. Releases before that note left such chunks out: absent
        # means zeros. Orbax's own restore draws the line at the same place.
        self._fill = meta.get("store_array_data_equal_to_fill_value") is not True
        manifest = (path / ORBAX_MANIFEST).exists()
        self._ocdbt = manifest if meta.get("use_ocdbt") is None else meta["use_ocdbt"] is True
        self.metadata = _strings(meta.get("custom_metadata"))
        self._strings: dict[str, Any] | None = None
        stored, scalars = [], []
        for name, kind in self._leaves(meta):
            if kind in _EMPTY:
                self.extras[name] = _EMPTY[kind]
            elif kind == "string":
                self.extras[name] = self._string(name)
            else:
                stored.append(name)
                scalars += [name] if kind == "scalar" else []
        if stored and self._ocdbt and not manifest:
            raise CorruptInput(f"{path}: {ORBAX_MANIFEST} is missing", AGAIN)
        self.arrays = self._headers(stored, disk)
        for name in scalars:
            if self.arrays[name].info.size != 1:
                raise CorruptInput(f"{path}: {name} is no single number, as it should be", AGAIN)
            self.extras[name] = self.read(name).item()
            del self.arrays[name]

    @functools.cached_property
    def _ts(self) -> ModuleType:
        return tensorstore()

    @functools.cached_property
    def _context(self) -> Any:
        return self._ts.Context(CONTEXT)

    def _leaves(self, meta: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """Name and kind of each leaf; refuses names that cannot be, and two of one name."""
        entries = meta.get("tree_metadata")
        if not isinstance(entries, dict):
            raise CorruptInput(f"{self.path / ORBAX_TREE}: holds no tree", AGAIN)
        seen = set()
        for where, entry in entries.items():
            match entry:
                case {"key_metadata": [*keys], "value_metadata": {"value_type": str(kind)}}:
                    path = [k["key"] for k in keys if isinstance(k, dict) and "key" in k]
                case _:
                    keys, path, kind = [None], [], ""
            if len(path) != len(keys) or not all(isinstance(key, str) for key in path):
                raise CorruptInput(f"{self.path / ORBAX_TREE}: {where!r} is malformed", AGAIN)
            if reason := wrong_name(path):
                raise UnsafeInput(
                    f"{self.path / ORBAX_TREE}: the key {where!r} {reason}",
                    "no checkpoint needs that: do not trust it",
                )
            name = ".".join(path)
            if name in seen:
                raise CorruptInput(f"{self.path / ORBAX_TREE}: {name} stands twice", AGAIN)
            seen.add(name)
            yield name, kind

    def _string(self, name: str) -> str:
        if self._strings is None:
            self._strings = read_json(self.path / _STRINGS)
        value: Any = self._strings
        for part in name.split("/"):  # Orbax addresses it with a JSON pointer
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, str):
            raise CorruptInput(f"{self.path / _STRINGS}: {name} is missing", AGAIN)
        return value

    def _kvstore(self, name: str) -> dict[str, Any]:
        base = {"driver": "file", "path": f"{os.path.abspath(self.path)}/"}
        if not self._ocdbt:
            return {**base, "path": f"{base['path']}{name}/"}
        return {"driver": "ocdbt", "base": base, "path": name, "cache_pool": "cache_pool#ocdbt"}

    def _headers(self, names: list[str], disk: int) -> dict[str, ZarrArray]:
        file = "zarr.json" if self._zarr3 else ".zarray"
        if not self._ocdbt:
            raws: list[bytes | None] = [self._header(name, file) for name in names]
            sizes = [bytes_below(self.path / name) for name in names]
        else:
            store = self._ts.KvStore.open(self._kvstore(""), context=self._context)
            reads = guarded(
                lambda: [store.result().read(f"{name}/{file}") for name in names],
                f"{self.path / ORBAX_MANIFEST}",
            )
            raws = []
            for name, read in zip(names, reads, strict=True):
                found = guarded(read.result, f"{self.path}: {name}")
                raws.append(bytes(found.value) if found.state == "value" else None)
            sizes = [disk] * len(names)
        arrays = {}
        for name, raw, size in zip(names, raws, sizes, strict=True):
            if raw is None:
                raise CorruptInput(f"{self.path}: {name} has no {file}", AGAIN)
            arrays[name] = parse(raw, self._zarr3, size, f"{self.path}: {name}")
        return arrays

    def _header(self, name: str, file: str) -> bytes:
        """What a file says of an array; CorruptInput where there is none."""
        try:
            raw = read_small(self.path / name / file)
        except OSError as e:
            raise CorruptInput(f"{self.path}: {name}: {e.strerror}", AGAIN) from None
        if raw is None:
            raise CorruptInput(f"{self.path}: {name} has no {file}", AGAIN)
        return raw

    def spans(self, name: str, root: Path) -> list[Span]:
        """Where the array lies in files below `root`, if it lies there as it is; else nothing."""
        array = self.arrays[name]
        if self._ocdbt or array.plain is None or not array.info.size:
            return []
        whole_chunk = math.prod(array.chunks) * dtypes.itemsize(array.info.dtype)
        found = []
        for file, nbytes in chunk_files(array):
            path = self.path / name / file
            if not path.is_file() or path.stat().st_size != whole_chunk:
                return []  # TensorStore knows what that means, or says what is wrong
            found.append(Span(0, nbytes, os.path.relpath(path, root)))
        return found

    def read(
        self, name: str, region: Region | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """The array `name`. Our own memory first: TensorStore aborts where it gets none."""
        info, what = self.arrays[name].info, f"{self.path}: {name}"
        region = whole(info.shape) if region is None else region
        into = out
        if into is None:
            into = guarded(lambda: np.empty(extent(region), dtypes.NUMPY[info.dtype]), what)
        if into.size == 0:
            return into
        spec = {
            "driver": "zarr3" if self._zarr3 else "zarr",
            "kvstore": self._kvstore(name),
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
            "fill_missing_data_reads": self._fill,
        }

        def fill() -> None:
            stored = self._ts.open(spec, open=True, read=True, context=self._context).result()
            target = self._ts.array(into, copy=False, write=True)
            target.write(stored[region].translate_to[(0,) * into.ndim]).result()

        guarded(fill, what)
        return into


def _strings(custom: Any) -> dict[str, str]:
    """Custom metadata: strings as they are, what else JSON holds as JSON."""
    if not isinstance(custom, dict):
        return {}
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in custom.items()}
