"""safetensors: our reader and writer against the library, the specification and damage."""

from __future__ import annotations

import json
import os
import random
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.containers import dtypes
from zoo.containers.base import TensorInfo
from zoo.containers.errors import CorruptInput, UsageError, ZooError
from zoo.containers.safetensors_file import RANK, SafetensorsReader, SafetensorsWriter

CODES = [code for code in dtypes.NUMPY if code in RANK]


def noise(code: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random bits as dtype `code`: NaN payloads, infinities, subnormals and all."""
    info = TensorInfo(code, shape)
    raw = np.random.default_rng(seed).integers(0, 256, info.nbytes, np.uint8)
    return (raw & 1 if code == "BOOL" else raw).view(dtypes.NUMPY[code]).reshape(shape)


def bits(array: np.ndarray) -> tuple[Any, ...]:
    return array.dtype, array.shape, array.tobytes()


def header_of(arrays: dict[str, np.ndarray]) -> dict[str, TensorInfo]:
    return {n: TensorInfo(dtypes.code_of(a.dtype), a.shape) for n, a in arrays.items()}


def write(
    path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None
) -> bytes:
    with SafetensorsWriter(path, header_of(arrays), metadata or {}) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
        writer.finish()
    return path.read_bytes()


def file_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def item(shape: Any, start: Any, stop: Any, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


@pytest.fixture
def everything() -> dict[str, np.ndarray]:
    """Every dtype, with no axis, an empty one, and three."""
    shapes: list[tuple[int, ...]] = [(), (3, 0, 2), (2, 3, 5)]
    return {f"{c}.{len(s)}.{0 in s}": noise(c, s) for c in CODES for s in shapes}


def test_bytes_spelled_out(path: Path) -> None:
    arrays = {"b": np.array([1, 2], np.uint8), "a": np.array([[-0.0]], np.float32)}
    header = (
        b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]},'
        b'"b":{"dtype":"U8","shape":[2],"data_offsets":[4,6]}}'
    )
    length = b"\x90\0\0\0\0\0\0\0"
    assert len(header) == 0x90 - 5
    expected = length + header + b" " * 5 + b"\0\0\0\x80" + b"\1\2"
    assert write(path, arrays, {"format": "pt"}) == expected


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_bytes_are_the_librarys(
    path: Path, everything: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    everything |= {'ü\x00\x1b\u2028\x7f"\\/\n\b': np.float64([1])}
    shuffled = dict(random.Random(0).sample(sorted(everything.items()), len(everything)))
    ours = write(path, shuffled, metadata)
    assert ours == safetensors.numpy.save(everything, metadata or None)


def test_no_tensors(path: Path) -> None:
    assert write(path, {}) == safetensors.numpy.save({})
    with SafetensorsReader(path) as reader:
        assert reader.tensors == {}


def test_torch_reads_what_we_write(path: Path, everything: dict[str, np.ndarray]) -> None:
    write(path, everything)
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == everything.keys()
    for name, array in everything.items():
        tensor = loaded[name]
        assert tensor.shape == array.shape
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes(), name


def test_we_read_what_torch_writes(path: Path) -> None:
    tensors = {
        "nan": torch.tensor([0x7FC1, -2, 0x0001], dtype=torch.int16).view(torch.bfloat16),
        "fp8": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(16, 16),
        "complex": torch.tensor([1 - 2j]),
        "zero": torch.tensor(-0.0),
        "flag": torch.tensor([True, False]),
    }
    safetensors.torch.save_file(tensors, path, {"format": "pt", "k": "ä"})
    with SafetensorsReader(path) as reader:
        assert reader.metadata == {"format": "pt", "k": "ä"}
        assert reader.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert reader.read(name).tobytes() == raw, name
        assert reader.tensors["fp8"] == TensorInfo("F8_E4M3", (16, 16))
        assert reader.tensors["zero"] == TensorInfo("F32", ())


def test_every_dtype_bit_for_bit(path: Path, everything: dict[str, np.ndarray]) -> None:
    write(path, everything)
    with SafetensorsReader(path) as reader:
        assert reader.tensors == header_of(everything)
        for name, array in everything.items():
            got = reader.read(name)
            assert bits(got) == bits(array), name
            assert got.flags.c_contiguous
            assert got.flags.writeable


def test_any_memory_order(path: Path) -> None:
    base = noise("F32", (6, 4, 2))
    arrays = {
        "fortran": np.asfortranarray(base),
        "transposed": base.T,
        "strided": base[::2, ::-1],
        "broadcast": np.broadcast_to(base[0, 0], (3, 2)),
    }
    write(path, arrays)
    with SafetensorsReader(path) as reader:
        for name, array in arrays.items():
            assert bits(reader.read(name)) == bits(np.array(array, order="C")), name


def test_order_of_writing_does_not_matter(
    tmp_path: Path, everything: dict[str, np.ndarray]
) -> None:
    backwards = dict(reversed(everything.items()))
    metadata = {"b": "1", "a": "2"}
    assert write(tmp_path / "1", everything, metadata) == write(
        tmp_path / "2", backwards, dict(sorted(metadata.items()))
    )


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        st.tuples(st.sampled_from(CODES), st.lists(st.integers(0, 4), max_size=4)),
        max_size=6,
    ),
    st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=1),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, tuple[str, list[int]]],
    metadata: dict[str, str],
) -> None:
    arrays = {n: noise(c, tuple(s), i) for i, (n, (c, s)) in enumerate(tensors.items())}
    path = tmp_path_factory.mktemp("round") / "x"
    raw = write(path, arrays, metadata)
    assert raw == safetensors.numpy.save(arrays, metadata or None)
    with SafetensorsReader(path) as reader:
        assert reader.metadata == metadata
        assert {n: bits(reader.read(n)) for n in reader.tensors} == {
            n: bits(a) for n, a in arrays.items()
        }


def test_writer_refuses_misuse(path: Path) -> None:
    header = {"a": TensorInfo("F32", (2,)), "b": TensorInfo("F32", ())}
    with SafetensorsWriter(path, header, {}) as writer:
        for wrong in (np.zeros(2), np.zeros(3, np.float32), np.zeros((1, 2), np.float32)):
            with pytest.raises(ValueError, match="a: header says F32"):
                writer.write("a", wrong)
        writer.write("a", np.zeros(2, np.float32))
        with pytest.raises(ValueError, match=r"never written: \['b'\]"):
            writer.finish()
    with pytest.raises(FileExistsError):
        SafetensorsWriter(path, header, {})
    assert path.stat().st_size > 0


@pytest.mark.parametrize("name", ["__metadata__", "a\ud800b"])
def test_writer_refuses_names(path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"__metadata__|ud800") as e:
        SafetensorsWriter(path, {name: TensorInfo("F32", ())}, {})
    str(e.value).encode()
    assert e.value.exit_code == 2
    assert not path.exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_mode_obeys_the_umask(path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write(path, {"a": np.zeros(1)})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_finish_syncs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    raw = write(path, {"a": np.zeros(1)})
    assert synced == [len(raw)]


def test_beyond_two_gib(path: Path) -> None:
    size = 2**31 + 8
    header = {"a": TensorInfo("U8", (size,)), "b": TensorInfo("U8", (3,))}
    with SafetensorsWriter(path, header, {}) as writer:
        writer.write("b", np.array([1, 2, 3], np.uint8))  # `a` stays a hole
    assert path.stat().st_blocks * 512 < 2**20
    with safetensors.safe_open(path, "np") as library:
        assert library.get_slice("b")[:].tolist() == [1, 2, 3]
    with SafetensorsReader(path) as reader:
        assert reader.read("b").tolist() == [1, 2, 3]


def test_truncation_is_seen(path: Path, everything: dict[str, np.ndarray]) -> None:
    raw = write(path, everything, {"format": "pt"})
    for n in range(0, len(raw), 10):
        path.write_bytes(raw[:n])
        with pytest.raises(CorruptInput, match=r"x\.safetensors"):
            SafetensorsReader(path)
    path.write_bytes(raw + b"\0")
    with pytest.raises(CorruptInput, match="appended"):
        SafetensorsReader(path)


def test_truncation_under_an_open_reader(path: Path) -> None:
    write(path, {"a": np.zeros(100)})
    with SafetensorsReader(path) as reader:
        os.truncate(path, 200)
        with pytest.raises(CorruptInput, match=r"a: the file ends .* too early"):
            reader.read("a")


def hostile() -> Iterator[Any]:
    for case, raw, message in [
        ("nothing", b"", "too early"),
        ("length", struct.pack("<Q", 2**60) + b"{}", f"claims {2**60} bytes"),
        ("library limit", struct.pack("<Q", 100_000_001) + b"{}", "claims 100000001"),
        ("no JSON", file_of(b"{nonsense"), "cannot be read"),
        ("no object", file_of(b"[]"), "not a JSON object"),
        ("space first", file_of(b" {}"), "not a JSON object"),
        ("UTF-16", file_of('{"a":{}}'.encode("utf-16-le")), "cannot be read"),
        ("not UTF-8", file_of(b'{"\xff":{}}'), "cannot be read"),
        ("surrogate", file_of(rb'{"a\ud800":{}}'), r"a\\ud800' is not valid Unicode"),
        (
            "surrogate in metadata",
            file_of(rb'{"__metadata__":{"k":"\udfff"}}'),
            r"udfff' is not valid Unicode",
        ),
        ("deep", file_of(b'{"a":' + b"[" * 100_000), "cannot be read"),
        ("deep and whole", file_of(b'{"a":' + b"[" * 9999 + b"]" * 9999 + b"}"), "cannot be read"),
        ("long number", file_of(b'{"a":' + b"9" * 5000 + b"}"), "cannot be read"),
        ("entry", file_of({"weight": 1}), "weight has a malformed entry"),
        ("entry lacks", file_of({"weight": {"dtype": "U8"}}), "weight has a malformed entry"),
        ("dtype", file_of({"w": item([], 0, 1, 8)}), "w has a malformed entry"),
        ("unknown dtype", file_of({"w": item([], 0, 1, "F4")}), "w has dtype 'F4'"),
        ("shape", file_of({"w": item("2", 0, 1)}, b"1"), "w has a malformed entry"),
        ("negative", file_of({"w": item([-1, -1], 0, 1)}, b"1"), r"w has the shape \[-1, -1\]"),
        ("bool", file_of({"w": item([True], 0, 1)}, b"1"), r"w has the shape \[True\]"),
        ("float", file_of({"w": item([1.0], 0, 1)}, b"1"), r"w has the shape \[1.0\]"),
        ("absurd", file_of({"w": item([2**62, 2**62, 0], 0, 0)}), "w has the shape"),
        ("65 axes", file_of({"w": item([1] * 65, 0, 1)}, b"1"), "w has the shape"),
        ("offset true", file_of({"w": item([], False, True)}, b"1"), "w has a malformed entry"),
        ("offset float", file_of({"w": item([], 0, 1.0)}, b"1"), "w has a malformed entry"),
        ("offset negative", file_of({"w": item([1], -1, 0)}, b"1"), "w needs 1 bytes"),
        ("offsets swapped", file_of({"w": item([1], 1, 0)}, b"1"), "w needs 1 bytes"),
        ("offset beyond", file_of({"w": item([1], 9, 10)}, b"1"), "w starts at byte 9"),
        ("data too short", file_of({"w": item([2], 0, 2)}, b"1"), "need .* bytes, the file has"),
        ("data appended", file_of({"w": item([], 0, 1)}, b"12"), "need .* bytes, the file has"),
        ("wrong size", file_of({"w": item([3], 0, 2)}, b"12"), "w needs 3 bytes, its range has 2"),
        (
            "overlap",
            file_of({"v": item([2], 0, 2), "w": item([2], 1, 3)}, b"123"),
            "w starts at byte 1, where 2 is expected",
        ),
        (
            "shared",
            file_of({"v": item([2], 0, 2), "w": item([2], 0, 2)}, b"12"),
            "w starts at byte 0, where 2 is expected",
        ),
        (
            "hole",
            file_of({"v": item([1], 0, 1), "w": item([1], 2, 3)}, b"123"),
            "w starts at byte 2, where 1 is expected",
        ),
        ("hole first", file_of({"w": item([1], 1, 2)}, b"12"), "w starts at byte 1"),
        (
            "duplicate",
            file_of(b'{"w":%b,"w":%b}' % ((json.dumps(item([1], 0, 1)).encode(),) * 2), b"1"),
            "the name 'w' stands twice",
        ),
        ("metadata a tensor", file_of({"__metadata__": item([], 0, 1)}, b"1"), "map of strings"),
        ("metadata nested", file_of({"__metadata__": {"a": {}}}), "map of strings"),
        ("metadata a list", file_of({"__metadata__": []}), "map of strings"),
    ]:
        yield pytest.param(raw, message, id=case)


@pytest.mark.parametrize(("raw", "message"), list(hostile()))
def test_hostile_headers(path: Path, raw: bytes, message: str) -> None:
    path.write_bytes(raw)
    with pytest.raises(CorruptInput, match=message) as e:
        SafetensorsReader(path)
    assert e.value.exit_code == 5
    assert e.value.problem.startswith(str(path))
    assert len(str(e.value).splitlines()) == 2


def test_order_in_the_file_is_free(path: Path) -> None:
    path.write_bytes(
        file_of({"w": item([1], 2, 3), "none": item([0], 2, 2), "v": item([2], 0, 2)}, b"123")
    )
    with SafetensorsReader(path) as reader:
        assert list(reader.tensors) == ["w", "none", "v"]
        assert reader.read("w").tobytes() == b"3"
        assert reader.read("v").tobytes() == b"12"
        assert reader.read("none").shape == (0,)


def test_random_damage(path: Path, everything: dict[str, np.ndarray]) -> None:
    raw = write(path, everything, {"format": "pt"})
    length = 8 + struct.unpack("<Q", raw[:8])[0]
    rng = random.Random(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(raw)
        for _ in range(rng.choice([1, 1, 2, 10])):
            damaged[rng.randrange(length)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            with SafetensorsReader(path) as reader:
                for name, info in reader.tensors.items():
                    assert reader.read(name).shape == info.shape
        except ZooError:
            refused += 1
    assert 100 < refused < 400
