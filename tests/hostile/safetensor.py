"""Hostile safetensors files: headers that lie, contradict themselves, or never end."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from hostile import Cases, file

ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def raw(header: Any, data: bytes = bytes(4), length: int | None = None) -> bytes:
    """A file with this header, as JSON data or as it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changed: Any) -> bytes:
    """A file of one tensor, with other fields."""
    return raw({"a.weight": ONE | changed})


def _headers() -> dict[str, bytes]:
    deep = b'{"a":' * 20_000 + b"1" + b"}" * 20_000
    nested = b'{"__metadata__":{"x":' + b"[" * 50_000 + b"]" * 50_000 + b"}}"
    return {
        "length: nothing follows": struct.pack("<Q", 8),
        "length: 2^63": raw({"a": ONE}, length=1 << 63),
        "length: 2^64 - 1": raw({"a": ONE}, length=(1 << 64) - 1),
        "length: one too many": raw({"a": ONE}, b"", length=len(json.dumps({"a": ONE})) + 1),
        "length: one too few": raw({"a": ONE}, length=len(json.dumps({"a": ONE})) - 1),
        "length: none": raw(b"{}", length=0),
        "length: half a gigabyte claimed": raw({"a": ONE}, length=1 << 29),
        "json: cut": raw(b'{"a":{"dtype":"F32"'),
        "json: two values": raw(b"{}{}"),
        "json: not UTF-8": raw(b'{"\xff":1}'),
        "json: a lone surrogate": raw(b'{"\\ud800":' + json.dumps(ONE).encode() + b"}"),
        "json: UTF-16": raw("{}".encode("utf-16")),
        "json: a byte order mark": raw(b"\xef\xbb\xbf{}"),
        "json: 20,000 deep": raw(deep),
        "json: deep metadata": raw(nested),
        "json: NaN": raw(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}'),
        "json: an infinite size": raw(
            b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}'
        ),
        "json: 4,300 digits": raw(
            b'{"a":{"dtype":"F32","shape":[1' + b"0" * 4300 + b'],"data_offsets":[0,4]}}'
        ),
        "json: a million digits": raw(
            b'{"a":{"dtype":"F32","shape":[1' + b"0" * 10**6 + b'],"data_offsets":[0,4]}}'
        ),
        "json: a comment": raw(b'{/* */"a":1}'),
        "json: a list": raw(b"[]" + b" " * 8),
        "json: one name twice": raw(
            b'{"a":' + json.dumps(ONE).encode() + b',"a":' + json.dumps(ONE).encode() + b"}"
        ),
        "json: metadata twice": raw(b'{"__metadata__":{},"__metadata__":{}}', b""),
        "json: a key twice in an entry": raw(
            b'{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}'
        ),
        "metadata: a list": raw({"__metadata__": ["x"], "a": ONE}),
        "metadata: a number": raw({"__metadata__": {"x": 1}, "a": ONE}),
        "metadata: a map": raw({"__metadata__": {"x": {}}, "a": ONE}),
        "metadata: null": raw({"__metadata__": None, "a": ONE}),
    }


def _entries() -> dict[str, bytes]:
    two = {"a": ONE, "b": {**ONE, "data_offsets": [4, 8]}}
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return {
        "entry: a list": raw({"a": [ONE]}),
        "entry: null": raw({"a": None}),
        "entry: text": raw({"a": "F32"}),
        "entry: no dtype": raw({"a": {"shape": [1], "data_offsets": [0, 4]}}),
        "entry: a dtype of no number": entry(dtype=7),
        "entry: an unknown dtype": entry(dtype="F31"),
        "entry: a dtype with ESC": entry(dtype="\x1b[2J"),
        "entry: a shape that is a number": entry(shape=1),
        "entry: a shape of texts": entry(shape=["1"]),
        "entry: a shape of booleans": entry(shape=[True]),
        "entry: a fraction": entry(shape=[1.0]),
        "entry: negative": entry(shape=[-1]),
        "entry: two negatives": entry(shape=[-1, -1]),
        "entry: 2^64": entry(shape=[1 << 64]),
        "entry: 2^32 by 2^32": entry(shape=[1 << 32, 1 << 32]),
        "entry: 0 by 2^63": entry(shape=[0, 1 << 63], data_offsets=[0, 0]),
        "entry: 100,000 axes": entry(shape=[1] * 100_000),
        "offsets: three": entry(data_offsets=[0, 4, 8]),
        "offsets: texts": entry(data_offsets=["0", "4"]),
        "offsets: negative": entry(data_offsets=[-4, 0]),
        "offsets: backwards": entry(data_offsets=[4, 0]),
        "offsets: booleans": entry(data_offsets=[False, True]),
        "offsets: beyond the end": entry(data_offsets=[4, 8]),
        "offsets: 2^64": entry(data_offsets=[1 << 64, (1 << 64) + 4]),
        "offsets: overlapping": raw({"a": ONE, "b": ONE}),
        "offsets: a hole": raw({"a": ONE, "b": {**ONE, "data_offsets": [8, 12]}}, bytes(12)),
        "offsets: a hole in front": entry(data_offsets=[4, 8]) + bytes(4),
        "data: too short": raw(two, bytes(7)),
        "data: too long": raw(two, bytes(9)),
        "data: none": raw(two, b""),
        "data: a second file behind": raw(two, bytes(8) + raw(two, bytes(8))),
        "many: 400,000 empty tensors": raw({f"t{i}": empty for i in range(400_000)}, b""),
        "names: four megabytes": raw({"x" * 4_000_000: ONE}),
        "names: a terminal's escapes, and too short": raw({"\x1b]0;x\x07\u202e\0../": ONE}, b""),
    }


def cases() -> Cases:
    """The class."""
    found: Cases = {n: file("a.safetensors", x) for n, x in (_headers() | _entries()).items()}

    def sparse(folder: Path) -> Path:
        path = folder / "a.safetensors"
        with path.open("wb") as f:
            f.write(struct.pack("<Q", 90_000_000) + b"{")
            f.truncate(3 << 30)
        return path

    return found | {"sparse: a header of spaces and NULs": sparse}
