"""ONNX files that mean harm or are nonsense, 40 by class: a typed error at once, nothing outside
touched."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile.onnx_files import FILES, GOOD, apart, graph, model, surrounded

from zoo.containers import open_checkpoint
from zoo.containers.errors import CorruptInput, UnsafeInput, ZooError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a secret beside, and links to it within."""
    return surrounded(tmp_path)


def read_all(path: Path) -> None:
    with open_checkpoint(path) as reader:
        for name in reader.tensors:
            reader.read(name)


def test_the_good_one_is_read(folder: Path) -> None:
    path = folder / "a.onnx"
    path.write_bytes(GOOD)
    with open_checkpoint(path) as reader:
        assert reader.read("w").tobytes() == bytes(8)
    path.write_bytes(model(graph(apart("./data"))))
    with open_checkpoint(path) as reader:
        assert reader.read("w").tobytes() == bytes(8)


@pytest.mark.parametrize("name", FILES)
def test_is_refused_at_once(folder: Path, name: str) -> None:
    raw, told = FILES[name]
    path = folder / "a.onnx"
    path.write_bytes(raw)
    before = {p: p.lstat().st_mtime_ns for p in folder.parent.rglob("*")}
    begun = time.process_time()
    with pytest.raises(ZooError) as e:
        read_all(path)
    assert time.process_time() - begun < 1.5
    assert isinstance(e.value, CorruptInput | UnsafeInput)
    assert told in e.value.problem
    assert {p: p.lstat().st_mtime_ns for p in folder.parent.rglob("*")} == before
    outside = ("up", "up and back", "from the root", "a link", "a linked folder", "a hard link")
    if name.removeprefix("external: ") in outside:
        assert e.type is UnsafeInput


def test_every_cut_and_every_flipped_byte_is_an_error_or_a_tensor(folder: Path) -> None:
    path = folder / "a.onnx"
    refused = 0
    damaged: list[Callable[[int], bytes]] = [
        lambda i: GOOD[:i],
        lambda i: GOOD[:i] + bytes([GOOD[i] ^ 0xFF]) + GOOD[i + 1 :],
        lambda i: GOOD[:i] + struct.pack("B", GOOD[i] ^ 1) + GOOD[i + 1 :],
    ]
    for damage in damaged:
        for i in range(1, len(GOOD)):
            path.write_bytes(damage(i))
            try:
                read_all(path)
            except ZooError:
                refused += 1
    assert refused > len(GOOD)
