"""Sharded checkpoints: against huggingface_hub and transformers, and with hostile indexes."""

from __future__ import annotations

import json
import os
import random
import stat
from pathlib import Path
from typing import Any, ClassVar

import flax.serialization
import flax.traverse_util
import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.containers import dtypes
from zoo.containers.base import Reader, TensorInfo
from zoo.containers.errors import CorruptInput, UnsafeInput, UsageError, ZooError
from zoo.containers.flax_msgpack import MsgpackReader
from zoo.containers.safetensors_file import RANK, SafetensorsReader
from zoo.containers.sharded import ShardedReader, ShardedSafetensorsWriter

INDEX = "model.safetensors.index.json"


def noise(code: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random bits as dtype `code`: NaN payloads, infinities, subnormals and all."""
    info = TensorInfo(code, shape)
    raw = np.random.default_rng(seed).integers(0, 256, info.nbytes, np.uint8)
    return (raw & 1 if code == "BOOL" else raw).view(dtypes.NUMPY[code]).reshape(shape)


def bits(array: np.ndarray) -> tuple[Any, ...]:
    return array.dtype, array.shape, array.tobytes()


def write(
    path: Path, arrays: dict[str, np.ndarray], size: int, order: list[str] | None = None
) -> dict[str, bytes]:
    header = {n: TensorInfo(dtypes.code_of(a.dtype), a.shape) for n, a in arrays.items()}
    with ShardedSafetensorsWriter(path, header, {"format": "pt"}, size) as writer:
        for name in order or arrays:
            writer.write(name, arrays[name])
        writer.finish()
    return {p.name: p.read_bytes() for p in path.iterdir()}


def read_all(path: Path) -> dict[str, tuple[Any, ...]]:
    with ShardedReader(path, SafetensorsReader) as reader:
        return {name: bits(reader.read(name)) for name in reader.tensors}


def save(directory: Path, weight_map: Any, **shards: list[str]) -> Path:
    """Shards `x.st` of one-byte tensors, by keyword, and an index that says `weight_map`."""
    directory.mkdir(exist_ok=True)
    for shard, names in shards.items():
        tensors = {n: np.array([i], np.uint8) for i, n in enumerate(names)}
        safetensors.numpy.save_file(tensors, directory / f"{shard}.st", {"format": "pt"})
    index = directory / INDEX
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


class Stub(Reader):
    """A shard of another container."""

    container: ClassVar[str] = "torch"
    opened: ClassVar[list[str]] = []
    closed: ClassVar[list[str]] = []

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        facts = json.loads(path.read_text())
        self.tensors = {n: TensorInfo("F32", ()) for n in facts.pop("names")}
        self.__dict__ |= facts
        self.opened.append(path.name)

    def read(self, name: str, region: object = None, out: object = None) -> np.ndarray:
        return np.array(len(name), np.float32)

    def close(self) -> None:
        self.closed.append(self.path.name)


@pytest.fixture
def stub() -> type[Stub]:
    Stub.opened.clear()
    Stub.closed.clear()
    return Stub


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """Every dtype in turn, sizes from nothing to too large for a shard of 100 bytes."""
    sizes = [3, 0, 8, 40, 1, 13, 2]
    return {f"layer.{i}.w": noise(code, (sizes[i % 7],), i) for i, code in enumerate(RANK)}


def test_index_spelled_out(tmp_path: Path) -> None:
    tensors = {
        "z": np.zeros(4, np.uint8),
        "big": np.zeros(9, np.uint8),
        "a": np.zeros(4, np.uint8),
        "b": np.zeros((), np.uint8),
    }
    files = write(tmp_path / "out", tensors, 8)
    assert sorted(files) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        INDEX,
    ]
    assert files[INDEX].decode() == (
        '{\n  "metadata": {\n    "total_size": 18\n  },\n  "weight_map": {\n'
        '    "a": "model-00002-of-00003.safetensors",\n'
        '    "b": "model-00003-of-00003.safetensors",\n'
        '    "big": "model-00001-of-00003.safetensors",\n'
        '    "z": "model-00002-of-00003.safetensors"\n  }\n}\n'
    )


@pytest.mark.parametrize("size", [1, 60, 100, 161, 500])
def test_files_are_huggingface_hubs(
    tmp_path: Path, arrays: dict[str, np.ndarray], size: int
) -> None:
    tensors = {
        n: torch.from_numpy(a.copy().view(np.uint8)) for n, a in arrays.items()
    }  # as bytes: hub takes any dtype by its size alone
    theirs = huggingface_hub.split_torch_state_dict_into_shards(tensors, max_shard_size=size)
    assert theirs.is_sharded
    files = write(tmp_path / "out", arrays, size)
    index = json.loads(files.pop(INDEX))
    assert index == {
        "metadata": theirs.metadata,
        "weight_map": theirs.tensor_to_filename,
    }
    assert list(index["weight_map"]) == sorted(arrays)
    for file, names in theirs.filename_to_tensors.items():
        expected = {n: arrays[n] for n in names}
        assert files.pop(file) == safetensors.numpy.save(expected, {"format": "pt"})
    assert not files


@pytest.mark.parametrize("names", [["a", "b"], ["big"], []])
def test_what_fits_is_one_file(tmp_path: Path, names: list[str]) -> None:
    tensors = {n: np.zeros(20 if n == "big" else 5, np.uint8) for n in names}
    files = write(tmp_path / "out", tensors, 10)
    assert files == {"model.safetensors": safetensors.numpy.save(tensors, {"format": "pt"})}


def test_order_of_writing_does_not_matter(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    files = write(tmp_path / "1", arrays, 100)
    order = random.Random(0).sample(sorted(arrays), len(arrays))
    assert write(tmp_path / "2", arrays, 100, order) == files


def test_round_trip_of_every_dtype(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    write(tmp_path / "out", arrays, 100)
    assert read_all(tmp_path / "out" / INDEX) == {n: bits(a) for n, a in arrays.items()}
    with ShardedReader(tmp_path / "out" / INDEX, SafetensorsReader) as reader:
        assert reader.container == "safetensors"
        assert reader.metadata == {"format": "pt"}
        assert list(reader.tensors) == sorted(arrays)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 12), min_size=2, max_size=12), st.integers(1, 20))
def test_any_sizes(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int) -> None:
    path = tmp_path_factory.mktemp("sizes") / "out"
    tensors = {f"t{i}": noise("U8", (n,), i) for i, n in enumerate(sizes)}
    files = write(path, tensors, limit)
    if len(files) == 1:
        assert sum(sizes) <= limit
        return
    assert read_all(path / INDEX) == {n: bits(a) for n, a in tensors.items()}
    files.pop(INDEX)
    for raw in files.values():
        inside = [a.nbytes for a in safetensors.numpy.load(raw).values()]
        assert inside
        assert sum(inside) <= limit or len(inside) == 1


def test_hub_and_transformers_load_it(tmp_path: Path) -> None:
    from transformers.utils.hub import get_checkpoint_shard_files

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    wanted = {n: torch.full_like(t, i + 0.5) for i, (n, t) in enumerate(model.state_dict().items())}
    write(tmp_path / "out", {n: t.numpy() for n, t in wanted.items()}, 40)
    huggingface_hub.load_torch_model(model, tmp_path / "out", strict=True)
    assert all(torch.equal(t, wanted[n]) for n, t in model.state_dict().items())
    files, facts = get_checkpoint_shard_files(tmp_path / "out", tmp_path / "out" / INDEX)
    assert sorted(map(os.path.basename, files)) == sorted(
        p.name for p in (tmp_path / "out").glob("*.safetensors")
    )
    assert facts["all_checkpoint_keys"] == sorted(wanted)


def test_we_read_what_the_hub_writes(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.arange(i * 3, dtype=torch.bfloat16) for i in range(1, 8)}
    huggingface_hub.save_torch_state_dict(tensors, tmp_path, max_shard_size=50)
    got = read_all(tmp_path / INDEX)
    assert {n: raw for n, (_, _, raw) in got.items()} == {
        n: t.view(torch.uint8).numpy().tobytes() for n, t in tensors.items()
    }


def test_writer_misuse(tmp_path: Path) -> None:
    header = {"a": TensorInfo("U8", (2,)), "b": TensorInfo("U8", (2,))}
    for bad, message in [
        ({"__metadata__": TensorInfo("U8", ())}, "__metadata__"),
        ({"a\ud800": TensorInfo("U8", ())}, "ud800"),
    ]:
        with pytest.raises(UsageError, match=message):
            ShardedSafetensorsWriter(tmp_path / "out", bad, {}, 10)
    with pytest.raises(UsageError, match="cannot have 0 bytes"):
        ShardedSafetensorsWriter(tmp_path / "out", header, {}, 0)
    assert not (tmp_path / "out").exists()
    with ShardedSafetensorsWriter(tmp_path / "out", header, {}, 2) as writer:
        writer.write("b", np.zeros(2, np.uint8))
        with pytest.raises(ValueError, match=r"never written: \['a'\]"):
            writer.finish()
        with pytest.raises(ValueError, match="b was written twice"):
            writer.write("b", np.zeros(2, np.uint8))
    assert not (tmp_path / "out" / INDEX).exists()
    with pytest.raises(FileExistsError):
        ShardedSafetensorsWriter(tmp_path / "out", header, {}, 2)


def test_durable_and_readable_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    before = os.umask(0o022)
    try:
        files = write(tmp_path / "out", {"a": np.zeros(2), "b": np.zeros(2)}, 16)
    finally:
        os.umask(before)
    out = tmp_path / "out"
    assert sorted(synced) == sorted([str(out), *(str(out / f) for f in files)])
    assert synced[-1] == str(out)
    assert stat.S_IMODE(out.stat().st_mode) == 0o755
    assert {stat.S_IMODE((out / f).stat().st_mode) for f in files} == {0o644}


def test_few_files_stay_open(tmp_path: Path) -> None:
    header = {f"t{i}": TensorInfo("U8", (4,)) for i in range(300)}
    before = len(os.listdir("/proc/self/fd"))
    with ShardedSafetensorsWriter(tmp_path / "out", header, {}, 8) as writer:
        for name in header:
            writer.write(name, np.zeros(4, np.uint8))
            assert len(os.listdir("/proc/self/fd")) <= before + 1
        writer.finish()


def test_the_index_is_the_authority(tmp_path: Path) -> None:
    index = save(tmp_path, {"b": "y.st", "a": "x.st"}, x=["a"], y=["b"], stray=["a", "c"])
    (tmp_path / "broken.st").write_bytes(b"not a checkpoint")
    opened: list[str] = []

    def open_shard(path: Path) -> Reader:
        opened.append(path.name)
        return SafetensorsReader(path)

    with ShardedReader(index, open_shard) as reader:
        assert list(reader.tensors) == ["b", "a"]
        assert reader.read("a").tolist() == [0]
    assert sorted(opened) == ["x.st", "y.st"]


def test_index_without_metadata(tmp_path: Path) -> None:
    index = save(tmp_path, {}, x=["a"])
    index.write_text('{"weight_map": {"a": "x.st"}}')
    assert list(read_all(index)) == ["a"]


def test_symlinks_of_the_hub_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    save(blobs, {"a": "x.st"}, x=["a"]).rename(blobs / "0123")
    (snapshot / "x.st").symlink_to("../../blobs/x.st")
    (snapshot / INDEX).symlink_to("../../blobs/0123")
    assert list(read_all(snapshot / INDEX)) == ["a"]


def test_all_differences_in_one_error(tmp_path: Path) -> None:
    weight_map = {"a": "x.st", "gone": "x.st", "lost": "y.st", "m": "none.st", "n": "nil.st"}
    index = save(tmp_path, weight_map | {"moved": "y.st"}, x=["a", "extra", "moved"], y=["moved"])
    with pytest.raises(CorruptInput) as e:
        ShardedReader(index, SafetensorsReader)
    assert e.value.exit_code == 5
    start, found = e.value.problem.split(" does not fit its shards: ")
    assert start == str(index)
    assert found.split("; ") == [
        "there is no file none.st",
        "there is no file nil.st",
        "gone is not in x.st",
        "lost is not in y.st",
        "extra is in x.st, of which the index knows nothing",
        "moved is in x.st, of which the index knows nothing",
    ]


def test_shards_that_are_no_files(tmp_path: Path) -> None:
    index = save(tmp_path, {"a": "folder", "b": "pipe", "c": "dangling", "d": "x" * 300})
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(CorruptInput, match=r"no file folder; .*pipe; .*dangling; .*xxx\n"):
        ShardedReader(index, SafetensorsReader)


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../x.st",
        "..",
        ".",
        "",
        "sub/x.st",
        "./x.st",
        "x.st/",
        "..\\x.st",
        "\\\\server\\share\\x.st",
        "C:x.st",
        "C:\\x.st",
        "x.st\0.txt",
    ],
)
def test_names_that_leave_the_directory(tmp_path: Path, name: str) -> None:
    index = save(tmp_path / "in", {"a": "x.st", "b": name, "c": "../c"}, x=["a"])
    (tmp_path / "in/sub").mkdir()
    for target in ("x.st", "in/sub/x.st"):
        (tmp_path / target).write_bytes((tmp_path / "in/x.st").read_bytes())

    def open_shard(path: Path) -> Reader:
        raise AssertionError(path)

    with pytest.raises(UnsafeInput) as e:
        ShardedReader(index, open_shard)
    assert e.value.exit_code == 4
    assert repr(name) in e.value.problem
    assert "'../c'" in e.value.problem
    assert "'x.st'" not in e.value.problem


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "cannot be read"),
        (b"[]", "is not a JSON object"),
        (b"{}", "weight_map is not a map"),
        (b'{"weight_map": ["x.st"]}', "weight_map is not a map"),
        (b'{"weight_map": {"a": 1}}', "weight_map is not a map"),
        (b'{"weight_map": {"a": ["x.st"]}}', "weight_map is not a map"),
        (b'{"weight_map": {}}', "weight_map is empty"),
        (b'{"weight_map": {"a": "x.st", "a": "y.st"}}', "the name 'a' stands twice"),
        (b'{"weight_map": {"a": "x.st"}, "weight_map": {}}', "the name 'weight_map' stands twice"),
        (rb'{"weight_map": {"\ud800": "x.st"}}', "ud800' is not valid Unicode"),
        (rb'{"weight_map": {"a": "\ud800"}}', "ud800' is not valid Unicode"),
        (b'{"weight_map": {"\xff": "x.st"}}', "cannot be read"),
        (b'{"weight_map": ' + b"[" * 100_000, "cannot be read"),
    ],
)
def test_hostile_indexes(tmp_path: Path, raw: bytes, message: str) -> None:
    index = tmp_path / INDEX
    index.write_bytes(raw)
    with pytest.raises(CorruptInput, match=message) as e:
        ShardedReader(index, SafetensorsReader)
    assert e.value.exit_code == 5
    assert e.value.problem.startswith(str(index))


def test_an_index_too_large(tmp_path: Path) -> None:
    (tmp_path / INDEX).touch()
    os.truncate(tmp_path / INDEX, 100_000_001)
    with pytest.raises(CorruptInput, match="more than 100000000 bytes"):
        ShardedReader(tmp_path / INDEX, SafetensorsReader)


def test_a_corrupt_shard_is_named_and_nothing_stays_open(tmp_path: Path) -> None:
    index = save(tmp_path, {"a": "x.st", "b": "y.st"}, x=["a"], y=["b"])
    os.truncate(tmp_path / "y.st", 20)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CorruptInput, match=r"y\.st: the header claims"):
        ShardedReader(index, SafetensorsReader)
    assert len(os.listdir("/proc/self/fd")) == before


def stub_index(directory: Path, **shards: dict[str, Any]) -> Path:
    for shard, facts in shards.items():
        (directory / shard).write_text(json.dumps(facts))
    index = directory / "pytorch_model.bin.index.json"
    where = {n: shard for shard, facts in shards.items() for n in facts["names"]}
    index.write_text(json.dumps({"weight_map": where}))
    return index


def test_flax_shards_of_transformers_4(tmp_path: Path) -> None:
    """Its indexes join the keys with slashes; a key may hold one itself."""
    trees = {
        "flax_model-00001-of-00002.msgpack": {"bert": {"w": np.float32([1]), "b": np.float32([2])}},
        "flax_model-00002-of-00002.msgpack": {"head": {"w": np.float32([3])}, "x/y": np.int8([4])},
    }
    weight_map = {}
    for file, tree in trees.items():
        (tmp_path / file).write_bytes(flax.serialization.to_bytes(tree))
        weight_map |= dict.fromkeys(flax.traverse_util.flatten_dict(tree, sep="/"), file)
    assert list(weight_map) == ["bert/w", "bert/b", "head/w", "x/y"]
    index = tmp_path / "flax_model.msgpack.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with ShardedReader(index, MsgpackReader) as reader:
        assert reader.container == "msgpack"
        got = {n: reader.read(n).tolist() for n in reader.tensors}
        assert got == {"bert.w": [1], "bert.b": [2], "head.w": [3], "x/y": [4]}
    index.write_text(json.dumps({"weight_map": weight_map | {"bert/no": file}}))
    with pytest.raises(CorruptInput, match="bert/no is not in flax_model-00002"):
        ShardedReader(index, MsgpackReader)


def test_what_shards_say_is_merged(tmp_path: Path, stub: type[Stub]) -> None:
    index = stub_index(
        tmp_path,
        x={
            "names": ["a", "tied"],
            "ties": {"tied": "a"},
            "metadata": {"same": "1", "other": "x", "only": "x"},
            "extras": {"step": 3, "lr": 0.1},
            "notices": ["old", "x only"],
        },
        y={
            "names": ["b"],
            "metadata": {"same": "1", "other": "y"},
            "extras": {"step": 4, "lr": 0.1},
            "notices": ["old"],
        },
        z={"names": ["c"], "metadata": {"other": "x"}},
    )
    with ShardedReader(index, stub) as reader:
        assert reader.container == "torch"
        assert ShardedReader.container == "safetensors"  # one reader does not change the others
        assert reader.ties == {"tied": "a"}
        assert reader.metadata == {"same": "1", "only": "x"}
        assert reader.extras == {"lr": 0.1}
        assert reader.notices == ["old", "x only"]
        assert reader.read("tied") == 4
    assert stub.opened == stub.closed == ["x", "y", "z"]


def test_shards_of_two_kinds(tmp_path: Path, stub: type[Stub]) -> None:
    index = save(tmp_path, {"a": "x.st", "b": "y"}, x=["a"])
    (tmp_path / "y").write_text('{"names": ["b"]}')

    def open_shard(path: Path) -> Reader:
        return SafetensorsReader(path) if path.suffix else stub(path)

    with pytest.raises(CorruptInput, match=r"several kinds, \['safetensors', 'torch'\]"):
        ShardedReader(index, open_shard)
    assert stub.closed == ["y"]


def test_random_damage(tmp_path: Path) -> None:
    write(tmp_path / "out", {f"t{i}": noise("F32", (i,), i) for i in range(6)}, 16)
    index = tmp_path / "out" / INDEX
    raw = index.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(raw)
        for _ in range(rng.choice([1, 1, 2, 10])):
            damaged[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        index.write_bytes(damaged)
        try:
            read_all(index)
        except ZooError:
            refused += 1
    assert 150 < refused < 300
