"""Conversions in slabs: whatever the memory and the threads, the bytes are the same."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import bits, write

import convert
from convert.api import plan
from zoo.checkpoint import hashes, slabs
from zoo.checkpoint.hashes import HashTree
from zoo.checkpoint.plan import Step
from zoo.containers import open_checkpoint
from zoo.containers.base import TensorInfo
from zoo.containers.errors import CorruptInput, NotEquivalent, UsageError
from zoo.containers.regions import runs, size, tiles, whole
from zoo.containers.safetensors_file import SafetensorsWriter
from zoo.containers.spans import SpanReader, SpanWriter
from zoo.layout import Entry, Layout, Tensor, attention, embedding, linear, norm, param
from zoo.layout.ops import Concat, Permute, Reorder, Stack

_E = (3, 40, 30)
LAYOUT = Layout(
    [
        *embedding("words", 100, 33),
        *linear("up", 50, 70),
        *attention("self", 24),
        *norm("norm", 70),
        param("scalar"),
        param("none", 0, 4),
        Entry("param", (Tensor("e", _E),), (Tensor("e", (40, 30, 3)),), (Permute((1, 2, 0)),)),
        Entry(  # three that are stacked, one after the other
            "param",
            tuple(Tensor(f"x.{i}", (20, 30)) for i in range(3)),
            (Tensor("x", (3, 30, 20)),),
            (Permute((1, 0)), Stack(0)),
        ),
        Entry(  # no box along the first axis of one is a box of the other
            "param",
            (Tensor("flat", (60, 44)),),
            (Tensor("flat", (44, 60)),),
            (Reorder(0, (3, 4, 5), (1, 2, 0)), Permute((1, 0))),
        ),
        Entry(  # nor along any
            "param",
            tuple(Tensor(f"y.{i}", (20, 6)) for i in range(2)),
            (Tensor("y", (40, 6)),),
            (Concat(0, (20, 20)), Reorder(0, (2, 20), (1, 0)), Reorder(1, (2, 3), (1, 0))),
        ),
    ]
)
# Machines are slow at times, and what is drawn is not at fault.
PATIENT = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SMALL = 4096  # bytes that a leaf has here, and less than most tensors


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "LEAF", SMALL // 4)
    monkeypatch.setattr(slabs, "COPIED", SMALL)
    monkeypatch.setattr(slabs, "_SPARE", 100)
    monkeypatch.setattr("convert.engine.prepare._LEAST", 1000)
    monkeypatch.setattr("zoo.containers.strided._STRIP", 700)
    monkeypatch.setattr("zoo.containers.orbax_dir.write._CHUNK", 1500)


def source(folder: Path, layout: Layout = LAYOUT) -> Path:
    rng, shapes = np.random.default_rng(0), layout.shapes("torch")
    arrays = {n: np.asarray(rng.standard_normal(s), np.float32) for n, s in shapes.items()}
    return write(SafetensorsWriter, folder / "a.safetensors", arrays)


def without_empty() -> Layout:
    return Layout([e for e in LAYOUT.entries if e.torch[0].name != "none"])


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", ["b.msgpack", "b.safetensors", "shards", "b.flax"])
def test_the_result_does_not_depend_on_slabs(name: str, verify: bool, tmp_path: Path) -> None:
    layout = without_empty() if name == "b.flax" else LAYOUT
    src = source(tmp_path, layout)
    told: dict[str, Any] = {"layout": layout, "framework": "flax", "verify": verify}
    if name == "shards":
        told |= {"max_shard_size": 20_000, "to": "safetensors"}
    results = []
    for i, (memory, workers) in enumerate([(None, 1), (9000, 2), (3000, 3)]):
        target = tmp_path / str(i) / name
        target.parent.mkdir()
        made = convert.convert(src, target, max_memory=memory, workers=workers, **told)
        with open_checkpoint(target, "flax") as reader:
            read = {n: bits(reader.read(n)) for n in reader.tensors}
        results.append((read, {t.target[0]: t.target_hashes for t in made.tensors}))
        if verify:
            assert convert.check(target).intact
    assert results[0] == results[1] == results[2]
    back = convert.convert(tmp_path / "2" / name, tmp_path / "c.safetensors", max_memory=3000)
    assert back.verified["level"] == "bits"
    with open_checkpoint(tmp_path / "c.safetensors") as there, open_checkpoint(src) as here:
        assert all(bits(there.read(n)) == bits(here.read(n)) for n in here.tensors)


@pytest.mark.parametrize("memory", [None, 3000])
def test_a_cast_in_slabs(memory: int | None, tmp_path: Path) -> None:
    src, target = source(tmp_path), tmp_path / "b.msgpack"
    made = convert.convert(
        *(src, target),
        **{"layout": LAYOUT, "framework": "flax", "dtype": "bfloat16", "max_memory": memory},
    )
    assert made.verified["level"] == "bits"
    with open_checkpoint(target) as there, open_checkpoint(src) as a:
        kernel = there.read("up.kernel")
        assert (kernel == a.read("up.weight").T.astype(kernel.dtype)).all()


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("name", ["up.kernel", "words.embedding", "x", "flat", "y"])
def test_one_wrong_byte_is_found(
    name: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever in a tensor it was written, and however that was cut."""
    src, write_ = source(tmp_path), SpanWriter._write

    def corrupt(self: SpanWriter, tensor: str, array: np.ndarray, region: Any) -> None:
        corner = [s.start if where == "first" else s.stop for s in region]
        ends = [0 if where == "first" else n for n in self.tensors[tensor].shape]
        if tensor == name and corner == ends:
            array = array.copy()
            array[(0,) * array.ndim if where == "first" else (-1,) * array.ndim] += 1
        write_(self, tensor, array, region)

    monkeypatch.setattr(SpanWriter, "_write", corrupt)
    with pytest.raises(NotEquivalent, match=name.replace(".", r"\.")):
        convert.convert(
            *(src, tmp_path / "b.msgpack"), layout=LAYOUT, framework="flax", max_memory=3000
        )
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_source_that_changes_while_it_is_read(tmp_path: Path) -> None:
    """In place, what was read already too: what was written is then a mixture."""
    src = source(tmp_path)

    def change(stage: str, done: int, total: int) -> None:
        with src.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")

    with pytest.raises(CorruptInput, match="was changed while it was read"):
        convert.convert(
            *(src, tmp_path / "b.msgpack"), layout=LAYOUT, framework="flax", progress=change
        )
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_pt_file_in_slabs(tmp_path: Path) -> None:
    """Views that lie across their storage too; a flipped byte is found before anything is kept."""
    with open_checkpoint(source(tmp_path)) as reader:
        state = {n: torch.from_numpy(reader.read(n)) for n in reader.tensors}
    state["up.weight"] = state["up.weight"].T.contiguous().T
    state["e"] = state["e"].transpose(0, 2).contiguous().transpose(0, 2)
    torch.save(state, tmp_path / "a.pt")
    told: dict[str, Any] = {"layout": LAYOUT, "framework": "flax"}
    convert.convert(tmp_path / "a.pt", tmp_path / "b.msgpack", max_memory=3000, **told)
    convert.convert(tmp_path / "a.safetensors", tmp_path / "c.msgpack", **told)
    assert (tmp_path / "b.msgpack").read_bytes() == (tmp_path / "c.msgpack").read_bytes()
    data = bytearray((tmp_path / "a.pt").read_bytes())
    with open_checkpoint(tmp_path / "a.pt") as reader:
        assert isinstance(reader, SpanReader)
        (span,) = reader.spans("words.weight") or ()
    data[span.offset + span.nbytes - 1] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    for verify in (True, False):
        with pytest.raises(CorruptInput, match="CRC-32"):
            convert.convert(
                *(tmp_path / "a.pt", tmp_path / "d.msgpack"),
                **{**told, "max_memory": 3000, "verify": verify},
            )
    assert not (tmp_path / "d.msgpack").exists()


def test_what_is_held_is_told_and_kept_to(tmp_path: Path) -> None:
    src, told = source(tmp_path), {"layout": LAYOUT, "framework": "flax"}
    assert plan(src, tmp_path / "b.msgpack", max_memory=40_000, workers=2, **told).memory <= 40_000
    mixed = 2 * 2 * 40 * 6 * 4  # of which every byte of the result needs two sources
    least = plan(src, tmp_path / "b.msgpack", max_memory=3000, workers=1, **told).memory
    assert least <= mixed
    for wrong in ({"max_memory": 10}, {"workers": 0}):
        with pytest.raises(UsageError, match=r"10 bytes|0 workers"):
            plan(src, tmp_path / "b.msgpack", **told, **wrong)


@PATIENT
@given(st.data())
def test_slabs_fill_both_sides(data: st.DataObject) -> None:
    """Every element is read once and written once; boxes that are hashed are whole leaves."""
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    axes = tuple(data.draw(st.permutations(range(len(shape)))))
    there = tuple(shape[a] for a in axes)
    undo = Permute(tuple(int(i) for i in np.argsort(axes)))
    infos = (TensorInfo("F32", shape),), (TensorInfo("F32", there),)
    step = Step(("a",), "param", ("a",), ("b",), *infos, (Permute(axes),), (undo,))
    room = data.draw(st.integers(4, 400))
    read, written = np.zeros(shape, int), np.zeros(there, int)
    for slab in slabs.cut([step], 2 * room, 1):
        for _, region in slab.reads:
            read[region] += 1
        for _, region in slab.writes:
            written[region] += 1
    assert (read == 1).all()
    assert (written == 1).all()


@PATIENT
@given(st.lists(st.integers(0, 7), max_size=4).map(tuple), st.integers(1024, 9000))
def test_leaves_are_the_bytes_in_order(shape: tuple[int, ...], room: int) -> None:
    """In whatever order they come: the tree's leaves are contiguous stretches of the tensor."""
    info = TensorInfo("F32", shape)
    tree, at = HashTree("sha256", info), 0
    for number, part in tree.leaves(whole(shape)):
        length, starts = runs(shape, part)
        assert list(starts) == [at]
        assert length * 4 <= hashes.LEAF
        at += size(part)
        tree.put(number, b"%d" % number)
    assert at == info.size
    assert tree.complete
    again = HashTree("sha256", info)
    for region in reversed(slabs.contiguous(info, room)):
        assert again.holds(region)
        for number, _ in again.leaves(region):
            again.put(number, b"%d" % number)
    assert again.hexdigest() == tree.hexdigest()


def test_a_hash_says_more_than_its_leaves() -> None:
    array = np.arange(4096, dtype=np.float32)
    found = hashes.of("sha256", array)
    assert found == hashes.of("sha256", array.copy())
    assert found != hashes.of("sha256", array[::-1].copy())
    digests = b"".join(
        hashes.digest("sha256", hashes.in_order(array[i : i + 256])) for i in range(0, 4096, 256)
    )
    assert found != hashes.digest("sha256", digests).hex(), "leaves are not taken for a tensor"
    assert found == hashes.digest("sha256", b"zooconvert leaves\0" + digests).hex()


def test_regions_are_written_by_threads_at_once(tmp_path: Path) -> None:
    array = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    info = {"a": TensorInfo("F32", array.shape)}
    parts = tiles(array.shape, (7, 9))
    with SafetensorsWriter(tmp_path / "a.safetensors", info, {}) as writer:
        threads = [
            threading.Thread(target=writer.write, args=("a", array.T[r].copy(), r)) for r in parts
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with pytest.raises(ValueError, match="a was written twice"):
            writer.write("a", array[parts[0]], parts[0])
        writer.finish()
    with open_checkpoint(tmp_path / "a.safetensors") as reader:
        assert (reader.read("a") == array.T).all()
        for region in parts:
            assert (reader.read("a", region) == array.T[region]).all()
