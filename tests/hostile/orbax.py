"""Hostile Orbax directories: trees, array headers and files that lie or lead out."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile import Cases, Make

ZARRAY: dict[str, Any] = {
    "zarr_format": 2, "shape": [4], "chunks": [4], "dtype": "<f4", "order": "C",
    "compressor": None, "filters": None, "fill_value": None, "dimension_separator": ".",
}  # fmt: skip
ZARR3: dict[str, Any] = {
    "zarr_format": 3, "node_type": "array", "shape": [4], "data_type": "float32",
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4]}},
    "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
    "fill_value": 0, "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    "attributes": {},
}  # fmt: skip
Change = Callable[[Path], object]


def leaf(*keys: Any, kind: Any = "np.ndarray") -> dict[str, Any]:
    """What _METADATA says of an array."""
    told = [{"key": k, "key_type": 2} for k in keys]
    return {"key_metadata": told, "value_metadata": {"value_type": kind}}


def base(folder: Path, zarr3: bool = False, tree: Any = None, **more: Any) -> Path:
    """One array, "a", in plain files."""
    root = folder / "c"
    (root / "a").mkdir(parents=True)
    tree = {"('a',)": leaf("a")} if tree is None else tree
    told = {"tree_metadata": tree, "use_ocdbt": False, "use_zarr3": zarr3} | more
    (root / "_METADATA").write_text(json.dumps(told))
    name, header, chunk = ("zarr.json", ZARR3, "c.0") if zarr3 else (".zarray", ZARRAY, "0")
    (root / "a" / name).write_text(json.dumps(header))
    (root / "a" / chunk).write_bytes(bytes(16))
    return root


def changed(change: Change, zarr3: bool = False) -> Make:
    """The base, with something done to it."""

    def make(folder: Path) -> Path:
        root = base(folder, zarr3)
        change(root)
        return root

    return make


def tree(value: Any, **more: Any) -> Make:
    """The base with another tree."""
    return lambda folder: base(folder, tree=value, **more)


def v2(**fields: Any) -> Make:
    """The base with another header of zarr 2."""
    return changed(lambda root: (root / "a/.zarray").write_text(json.dumps(ZARRAY | fields)))


def v3(**fields: Any) -> Make:
    """The same of zarr 3."""
    return changed(lambda root: (root / "a/zarr.json").write_text(json.dumps(ZARR3 | fields)), True)


def wrote(name: str, raw: bytes) -> Make:
    """The base with another file."""
    return changed(lambda root: (root / name).write_bytes(raw))


def _out(root: Path) -> None:
    (root.parent / "secret").mkdir()
    (root / "a/0").unlink()
    (root.parent / "secret/0").write_bytes(b"SECRET" + bytes(10))
    (root / "a/0").symlink_to(root.parent / "secret/0")


def _folder_out(root: Path) -> None:
    os.rename(root / "a", root.parent / "elsewhere")
    (root / "a").symlink_to(root.parent / "elsewhere")


def _pipe(root: Path) -> None:
    (root / "a/0").unlink()
    os.mkfifo(root / "a/0")


def _sparse(root: Path) -> None:
    with (root / "_METADATA").open("wb") as f:
        f.truncate(3 << 30)


def _ocdbt(root: Path) -> None:
    told = {"tree_metadata": {"('a',)": leaf("a")}, "use_ocdbt": True, "use_zarr3": False}
    (root / "_METADATA").write_text(json.dumps(told))
    (root / "manifest.ocdbt").write_bytes(
        b"\x0c\xdb\x3a\x2a" + struct.pack(">Q", 60) + b"\xff" * 48
    )


def _grid(chunks: Any) -> dict[str, Any]:
    return {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}}}


def cases() -> Cases:
    """The class."""
    many = {f"('{i}',)": leaf(str(i)) for i in range(100_000)}
    return {
        "tree: up": tree({"x": leaf("..", "..", "secret")}),
        "tree: up within a key": tree({"x": leaf("../../secret")}),
        "tree: from the root": tree({"x": leaf("/etc")}),
        "tree: NUL": tree({"x": leaf("a\0")}),
        "tree: a lone surrogate": tree({"x": leaf("\ud800")}),
        "tree: an empty key": tree({"x": leaf("")}),
        "tree: a key of a megabyte": tree({"x": leaf("k" * 1_000_000)}),
        "tree: a key that is a list": tree({"x": leaf(["a"])}),
        "tree: a kind that is a number": tree({"x": leaf("a", kind=7)}),
        "tree: one name twice": tree({"x": leaf("a"), "y": leaf("a")}),
        "tree: a list": tree([leaf("a")]),
        "tree: entries that are lists": tree({"x": []}),
        "tree: arrays that are not there": tree({"x": leaf("nowhere")}),
        "tree: 100,000 arrays that are not there": tree(many),
        "tree: text that is not there": tree({"x": leaf("s", kind="string")}),
        "tree: a scalar of four": tree({"x": leaf("a", kind="scalar")}),
        "json: 50,000 deep": wrote("_METADATA", b'{"a":' * 50_000),
        "json: not JSON": wrote("_METADATA", b"\x80\x02}."),
        "json: a list": wrote("_METADATA", b"[]"),
        "json: one key twice": wrote("_METADATA", b'{"tree_metadata":{},"tree_metadata":{}}'),
        "json: endless digits": wrote("_METADATA", b'{"tree_metadata":1' + b"0" * 5000 + b"}"),
        "json: sparse, of 3 GB": changed(_sparse),
        "v2: 2^40": v2(shape=[1 << 40]),
        "v2: 2^62 by 2^62": v2(shape=[1 << 62, 1 << 62], chunks=[1, 1]),
        "v2: chunks of 2^40": v2(chunks=[1 << 40]),
        "v2: a million chunks": v2(shape=[1 << 22], chunks=[1]),
        "v2: negative": v2(shape=[-1]),
        "v2: chunks of nothing": v2(chunks=[0]),
        "v2: of other ranks": v2(chunks=[4, 4]),
        "v2: objects": v2(dtype="|O"),
        "v2: a record": v2(dtype=[["x", "<f4"]]),
        "v3: 2^40": v3(shape=[1 << 40]),
        "v3: chunks of 2^40": v3(**_grid([1 << 40])),
        "v3: fractions": v3(shape=[4.0]),
        "v3: an irregular grid": v3(chunk_grid={"name": "rectangular"}),
        "v3: an unknown dtype": v3(data_type="float31"),
        "v3: a group": v3(node_type="group", shape=None),
        "v3: not JSON": changed(lambda root: (root / "a/zarr.json").write_bytes(b"{"), True),
        "links: a file out": changed(_out),
        "links: a folder out": changed(_folder_out),
        "links: a pipe": changed(_pipe),
        "ocdbt: no manifest": tree({"x": leaf("a")}, use_ocdbt=True),
        "ocdbt: a manifest of nonsense": changed(_ocdbt),
        "root: unfinished": changed(
            lambda root: (root / "_CHECKPOINT_METADATA").write_text('{"init_timestamp_nsecs": 1}')
        ),
    }
