"""All or nothing, for a checkpoint with all that belongs to it: crashes, resumes, interrupts."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import write

import convert
from convert.api import plan
from convert.engine.commit import commit
from convert.engine.stream import Stream
from convert.exporting import onnx_file
from convert.training_state.besides import read_training
from zoo.checkpoint import slabs
from zoo.checkpoint.label import Label
from zoo.containers import filenames, open_checkpoint
from zoo.containers.committed import beside
from zoo.containers.errors import CorruptInput, NoSpace, UnsafeInput, UsageError, ZooError
from zoo.containers.safetensors_file import SafetensorsWriter
from zoo.models.mlp import MODEL
from zoo.models.mlp.config import Config

ROOT = Path(__file__).parents[1]
CONFIG = Config((64, 64, 64, 64, 16), "tanh")
TOLD: dict[str, Any] = {"max_memory": 8_000_000, "workers": 1}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "COPIED", 4096)


def source(folder: Path, name: str = "a.safetensors", seed: int = 0) -> Path:
    rng, shapes = np.random.default_rng(seed), MODEL.layout_of(CONFIG).shapes("torch")
    arrays = {n: np.asarray(rng.standard_normal(s), np.float32) for n, s in shapes.items()}
    return write(SafetensorsWriter, folder / name, arrays, **Label(MODEL, CONFIG).to_metadata())


def with_optimizer(folder: Path, name: str = "a.pt", seed: int = 0) -> Path:
    with open_checkpoint(source(folder, f"{name}.safetensors", seed)) as reader:
        net = {n: torch.nn.Parameter(torch.from_numpy(reader.read(n))) for n in reader.tensors}
    optimizer = torch.optim.AdamW(net.items(), 1e-3)
    for p in net.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = {n: p.detach() for n, p in net.items()}
    torch.save({"model": state, "optimizer": optimizer.state_dict()}, folder / name)
    return folder / name


def hidden(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("containers", "crashes", "interrupts"),
    [("msgpack", 6, 1), pytest.param("orbax", 4, 0, marks=pytest.mark.slow)],
)
def test_torture(containers: str, crashes: int, interrupts: int) -> None:
    """A little of all that scripts/torture does."""
    few = [f"--crashes={crashes}", f"--interrupts={interrupts}", "--kills=1", "--resumes=1"]
    few += ["--power-cuts=6", "--disk-faults=4", "--flips=3", "--libraries=0", "--layers=6"]
    told = [sys.executable, str(ROOT / "scripts/torture.py"), f"--containers={containers}", *few]
    done = subprocess.run(told, capture_output=True, text=True, env={**os.environ, **_env()})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("synced", ["file and names", "file", "names"])
def test_a_power_cut_loses_what_was_not_synced(synced: str, tmp_path: Path) -> None:
    """The model of the disk is no kinder than one is: a rename that is durable before the bytes are
    gives a torn file, and one that is not durable may be undone."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from disk_model import Recorder, left

    folder = tmp_path / "disk"
    folder.mkdir()
    (folder / "a").write_bytes(b"old" * 4000)
    names, real = ("rename", "fsync"), (os.rename, os.fsync)
    recorder = Recorder(folder)
    recorder.hook(names)
    try:
        (folder / "b").write_bytes(b"new" * 4000)
        for what, path in (("file", folder / "b"), ("names", folder)):
            if what == "names":
                os.rename(folder / "b", folder / "a")
            if what in synced:
                fd = os.open(path, os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)
    finally:
        os.rename, os.fsync = real
    rng = random.Random(0)
    disk, seen = recorder.disk, set()
    for _ in range(200):
        found = left(disk, disk.moments, rng).get("a")
        whole = {b"old" * 4000: "old", b"new" * 4000: "new", None: "lost"}
        seen.add(whole.get(found, "torn"))
    assert (
        seen
        == {
            "file and names": {"new"},
            "file": {"old", "new"},
            "names": {"new", "torn"},
        }[synced]
    )


def _env() -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_sidecars_of_other_weights(tmp_path: Path) -> None:
    """As after somebody else's program wrote the weights anew."""
    a, b = tmp_path / "a.msgpack", tmp_path / "b.msgpack"
    told: dict[str, Any] = {"model": "mlp", "config": Label(MODEL, CONFIG)._data()["config"]}
    convert.convert(with_optimizer(tmp_path, "a.pt"), a, **told)
    convert.convert(with_optimizer(tmp_path, "b.pt", seed=1), b, **told)
    assert read_training(a).optimizers
    a.write_bytes(b.read_bytes())
    with pytest.raises(ZooError, match=r"a\.msgpack\.config\.json belongs to other weights"):
        convert.convert(a, tmp_path / "c.safetensors")
    prepared = plan(a, tmp_path / "c.safetensors", **told)
    assert not prepared.training.optimizers
    assert any("NOT converted" in n and "other weights" in n for n in prepared.notices)
    with pytest.raises(ZooError, match="belongs to other weights"):
        read_training(a, **told)


def test_a_config_edited_by_hand_is_used_and_told(tmp_path: Path) -> None:
    target = tmp_path / "a.msgpack"
    convert.convert(source(tmp_path), target)
    file = tmp_path / "a.msgpack.config.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data))
    back = tmp_path / "c.safetensors"
    assert not plan(target, back).notices, "laid out otherwise, it says the same"
    data["zoo"]["config"]["activation"] = "sigmoid"
    file.write_text(json.dumps(data))
    made = plan(target, back)
    assert made.plan.config.activation == "sigmoid"
    assert made.notices == [f"{file} was changed since it was written; it is used as it is"]


def interrupted(src: Path, target: Path, after: int, **told: Any) -> Path:
    """The workplace of a conversion that was interrupted after so many slabs."""
    left = [after]

    def stop(stage: str, done: int, total: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.convert(src, target, framework="flax", progress=stop, **TOLD, **told)
    (place,) = hidden(target.parent)
    assert not target.exists()
    return place


@pytest.mark.parametrize("name", ["b.msgpack", "b.flax", "shards", "b.safetensors"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_resumed_it_is_byte_for_byte_the_same(
    name: str, dtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, target = source(tmp_path), tmp_path / "to" / name
    told: dict[str, Any] = {"dtype": dtype}
    if name == "shards":
        told |= {"max_shard_size": 20_000, "to": "safetensors"}
    whole = tmp_path / name
    made = convert.convert(src, whole, framework="flax", **TOLD, **told)
    target.parent.mkdir()
    place = interrupted(src, target, 3, **told)
    assert [f.kind for f in convert.clean(target.parent, dry_run=True)] == ["resumable"]
    log = place / "resume.log"
    written = {json.loads(line)["slab"] for line in log.read_text().splitlines() if line}
    with log.open("a") as file:
        file.write('{"slab": 5, "leav')  # as a kill may leave it
    moved: list[int] = []
    real = Stream._moved
    monkeypatch.setattr(
        Stream, "_moved", lambda self, n, *rest: (moved.append(n), real(self, n, *rest))[1]
    )
    again = convert.convert(src, target, framework="flax", resume=True, **TOLD, **told)
    assert len(written) >= 3
    assert sorted([*moved, *written]) == list(range(len(moved) + len(written))), "none twice"
    assert again.tensors == made.tensors
    assert again.verified == made.verified
    assert not hidden(target.parent)
    assert convert.check(target).intact
    files = [p for p in sorted(target.rglob("*")) if p.is_file()] if target.is_dir() else [target]
    for file in files:
        other = whole / file.relative_to(target) if target.is_dir() else whole
        if file.name not in ("certificate.json", "_CHECKPOINT_METADATA"):  # which have times
            assert file.read_bytes() == other.read_bytes(), file.name


def test_resume_is_refused_for_another_conversion(tmp_path: Path) -> None:
    src, target = source(tmp_path), tmp_path / "b.msgpack"
    place = interrupted(src, target, 2)
    again: dict[str, Any] = {"framework": "flax", "resume": True}
    with pytest.raises(UsageError, match="interrupted was another") as e:
        convert.convert(src, target, **again, **{**TOLD, "workers": 2}, verify=False)
    assert e.value.details[:2] == [
        "--workers was 1, and is 2",
        "--no-verify was False, and is True",
    ]
    src.unlink()
    source(tmp_path, seed=1)
    with pytest.raises(UsageError) as e:
        convert.convert(src, target, **again, **TOLD)
    assert e.value.details == [f"the source {src} was changed since"]
    record = place / "resume.json"
    told = json.loads(record.read_text())
    record.write_text(json.dumps(told | {"boot": "another", "zooconvert": "0.0.1"}))
    with pytest.raises(UsageError) as e:
        convert.convert(src, target, **again, **TOLD)
    assert [d.split(" was")[0] for d in e.value.details[:2]] == ["zooconvert", f"the source {src}"]
    assert "restarted" in e.value.details[-1]
    assert place.is_dir()
    convert.convert(src, target, framework="flax")
    assert not hidden(tmp_path)
    convert.convert(src, target, **again, force=True)  # nothing was begun: all is done
    with pytest.raises(UsageError, match="cannot be resumed: torch writes"):
        convert.convert(target, tmp_path / "c.pt", resume=True)


def ctrl_c(code: str, *arguments: str, cwd: Path, wait: float) -> tuple[int, str, float]:
    heard = (
        "import signal; signal.signal(2, signal.default_int_handler)\n"  # if not in the background
    )
    process = subprocess.Popen(
        [sys.executable, "-c", heard + code, *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **_env()},
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(wait)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    return process.returncode, told, time.monotonic() - started


@pytest.mark.parametrize("wait", [0, 0.05])
def test_ctrl_c_while_it_is_imported(wait: float, tmp_path: Path) -> None:
    src = source(tmp_path)
    code = "import convert.__main__ as m; print(flush=True); m.main()"
    exit_code, told, seconds = ctrl_c(code, "inspect", str(src), cwd=tmp_path, wait=wait)
    assert exit_code in (130, -signal.SIGINT) if not wait else exit_code == 130
    assert seconds < 2
    if exit_code == 130:
        assert told == "error: interrupted; nothing was left behind\n"


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    source(tmp_path)
    slow = (
        "import time, convert.engine.stream as s; real = s.Stream._moved\n"
        "def moved(*a):\n    print('at work', flush=True); time.sleep(0.3); return real(*a)\n"
        "s.Stream._moved = moved\n"
        "from convert.__main__ import main; main()"
    )
    arguments = ("torch2flax", "a.safetensors", "b c.msgpack", "--workers", "1")
    exit_code, told, seconds = ctrl_c(slow, *arguments, cwd=tmp_path, wait=0.5)
    assert exit_code == 130
    assert seconds < 2
    (place,) = hidden(tmp_path)
    assert told.splitlines() == [
        f"error: interrupted; what is done is kept in {place.name}",
        "try: zooconvert torch2flax a.safetensors 'b c.msgpack' --workers 1 --resume",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "convert", *arguments, "--resume"],
        cwd=tmp_path,
        env={**os.environ, **_env()},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert not hidden(tmp_path)
    assert convert.check(tmp_path / "b c.msgpack").intact


@pytest.mark.parametrize("where", ["fsync", "pwrite", "torch"])
@pytest.mark.parametrize(
    ("number", "kind", "told"),
    [
        (errno.ENOSPC, NoSpace, "the disk is full"),
        (errno.EIO, ZooError, "input/output error"),
        (errno.EMFILE, ZooError, "too many files are open"),
    ],
)
def test_a_disk_that_fails(
    where: str,
    number: int,
    kind: type[ZooError],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the thread that syncs and within torch's writer too; the message shows the target."""
    src, target = source(tmp_path), tmp_path / ("b.pt" if where == "torch" else "b.msgpack")
    if where == "torch":
        convert.convert(src, tmp_path / "a.msgpack")
        src = tmp_path / "a.msgpack"
    before = sorted(p.name for p in tmp_path.iterdir())

    def fails(*args: Any) -> int:
        raise OSError(number, os.strerror(number))

    if where == "torch":
        monkeypatch.setattr("zoo.containers.torch_file._Through._put", fails)
    else:
        monkeypatch.setattr(os, where, fails)
    with pytest.raises(kind, match=told) as e:
        convert.convert(src, target)
    assert str(target) in e.value.problem
    assert ".zooconvert-" not in str(e.value)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == before


class Crash(BaseException):
    """The process ends here."""


def crash_after(last: int, patch: pytest.MonkeyPatch) -> None:
    """After so many of the calls that change the disk."""
    calls = iter(range(1, 1000))

    def hooked(real: Any) -> Any:
        def call(*a: Any, **kw: Any) -> None:
            real(*a, **kw)
            if next(calls) == last:
                raise Crash

        return call

    for name in ("fsync", "rename", "replace", "unlink"):
        patch.setattr(os, name, hooked(getattr(os, name)))


def test_a_crash_leaves_an_onnx_file_with_its_own_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each call of a commit that changes the disk: graph, data and certificate are of one."""
    import onnx_ir

    def generation(folder: Path, value: int) -> Path:
        place = folder / f".a.onnx{filenames.WORKPLACE}{value}"
        place.mkdir(parents=True)
        w = onnx_ir.tensor(np.full(200, value, np.float32), name="w")
        kind = onnx_ir.TensorType(w.dtype)
        held = onnx_ir.Value(name="w", const_value=w, shape=w.shape, type=kind)
        graph = onnx_ir.Graph([], [], nodes=[], initializers=[held], opset_imports={"": 20})
        name = filenames.onnx_data("a.onnx", f"{value:016x}")
        onnx_file.write(onnx_ir.Model(graph, ir_version=10), place / "a.onnx", name)
        (place / "a.onnx.certificate.json").write_text(str(value))
        return place

    def see(target: Path) -> list[int]:
        with open_checkpoint(target) as reader:
            found = [int(reader.read("w")[0])]
        return [*found, int(beside(target, filenames.CERTIFICATE).read_text())]

    seen = []
    for last in range(1, 99):
        folder = tmp_path / str(last)
        target = folder / "a.onnx"
        commit(generation(folder, 1), target, force=True)
        place = generation(folder, 2)
        with monkeypatch.context() as patch:
            crash_after(last, patch)
            try:
                commit(place, target, force=True)
            except Crash:
                pass
            else:
                break
        found = see(target)
        assert found in ([1, 1], [2, 2])
        convert.clean(folder)
        assert see(target) == found
        seen += found
        commit(generation(folder, 3), target, force=True)
        assert len(list(folder.glob("*.data"))) == 1
    assert {1, 2} == set(seen)
    assert last > 8


def test_a_journal_leads_nowhere_else(tmp_path: Path) -> None:
    place = tmp_path / f".b.msgpack{filenames.WORKPLACE}committed"
    place.mkdir()
    (place / "journal.json").write_text('{"files": ["b.msgpack"]}')
    (place / "b.msgpack").symlink_to("/etc/passwd")
    for work in (convert.inspect, lambda p: convert.clean(p.parent)):
        with pytest.raises(UnsafeInput, match="is a link"):
            work(tmp_path / "b.msgpack")
    (place / "journal.json").write_text('{"files": ["../a"]}')
    with pytest.raises(CorruptInput, match="does not say which files"):
        convert.inspect(tmp_path / "b.msgpack")
