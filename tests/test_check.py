"""A checkpoint against its certificate: whatever rots is found, and named."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support import canonical

import convert
import zoo
from convert.cli.main import cli
from zoo.checkpoint import hashes
from zoo.checkpoint.certificate import file_sha256, files_of
from zoo.checkpoint.label import Label
from zoo.containers import filenames, open_checkpoint
from zoo.containers.committed import beside
from zoo.containers.errors import CorruptInput, MissingExtra, UsageError
from zoo.containers.spans import SpanReader
from zoo.loading import build
from zoo.models.mlp import MODEL

CONFIG = next(iter(MODEL.tiny.values()))
TARGETS = ("net.safetensors", "net.msgpack", "net.pt", "net.flax", "shards")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in every container, with an optimizer and a config."""
    folder = tmp_path_factory.mktemp("written")
    net = build(MODEL, CONFIG, "torch", canonical(MODEL, CONFIG))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, folder / "last.pt")
    told: dict[str, Any] = {"model": "mlp", "config": Label(MODEL, CONFIG)._data()["config"]}
    convert.convert(folder / "last.pt", folder / "net.flax", **told)
    convert.convert(folder / "last.pt", folder / "net.msgpack", **told)
    convert.convert(folder / "net.flax", folder / "net.safetensors")
    convert.convert(folder / "net.flax", folder / "net.pt")
    (folder / "shards").mkdir()
    convert.convert(folder / "net.flax", folder / "shards", max_shard_size=400)
    return folder


def copied(written: Path, name: str, folder: Path) -> Path:
    """The checkpoint with what belongs to it, in another place."""
    for file in written.glob(f"{name}*"):
        if file.is_dir():
            shutil.copytree(file, folder / file.name)
        else:
            shutil.copy(file, folder / file.name)
    return folder / name


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_written_is_intact(written: Path, name: str) -> None:
    found = convert.check(written / name)
    assert found.intact
    assert found.tensors == len(MODEL.layout_of(CONFIG).entries)


@pytest.mark.parametrize("name", TARGETS)
def test_every_flipped_bit_is_found(written: Path, name: str, tmp_path: Path) -> None:
    """In the weights, the optimizer, the config, whatever lies in a directory, the certificate."""
    path = copied(written, name, tmp_path)
    files = [f for f in tmp_path.rglob("*") if f.is_file() and f.stat().st_size]
    rng = np.random.default_rng(0)
    for _ in range(60):
        file = files[int(rng.integers(len(files)))]
        data = file.read_bytes()
        rotten = bytearray(data)
        rotten[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        file.write_bytes(rotten)
        try:
            intact = convert.check(path).intact
        except CorruptInput:
            intact = False
        # Whitespace of the certificate's JSON may be other whitespace.
        assert not intact or json.loads(rotten) == json.loads(data), file
        file.write_bytes(data)
    assert convert.check(path).intact


def test_what_is_damaged_is_named(written: Path, tmp_path: Path) -> None:
    path = copied(written, "net.safetensors", tmp_path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    moments = tmp_path / "net.safetensors.optimizer.safetensors"
    data = bytearray(moments.read_bytes())
    data[-1] ^= 1
    moments.write_bytes(data)
    tensor, moment = convert.check(path).damaged
    assert tensor.endswith(": its bytes are others")
    assert moment.startswith(f"{moments.name}: ")
    with pytest.raises(CorruptInput, match="things differ"):
        zoo.load(path, "torch", check_hashes=True)
    zoo.load(path, "torch")


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("whole", [True, False], ids=["files", "tensors alone"])
def test_format_1_is_still_read(written: Path, name: str, whole: bool, tmp_path: Path) -> None:
    """As it was before hashes were trees: SHA-256 of tensors, and of whole files or of none."""
    path = copied(written, name, tmp_path)
    file = beside(path, filenames.CERTIFICATE)
    data = json.loads(file.read_text())
    with open_checkpoint(path) as reader:
        for record in data["tensors"]:
            del record["source_hashes"], record["target_hashes"]
            plain = [hashlib.sha256(reader.read(n).tobytes()).hexdigest() for n in record["target"]]
            record |= {"source_sha256": [], "target_sha256": plain}
    del data["hash"], data["sha256"]
    data["training"] = {}
    data["files"] = {n: file_sha256(p) for n, p in files_of(path).items()} if whole else {}
    file.write_text(json.dumps(data | {"format": 1}))
    assert convert.check(path).intact
    with open_checkpoint(path) as reader:
        assert isinstance(reader, SpanReader)
        first, offset, _ = next(reader.stretches())
    rotten = bytearray(first.read_bytes())
    rotten[offset] ^= 1
    first.write_bytes(rotten)
    damaged = convert.check(path).damaged
    assert damaged
    assert any("was changed since" in told for told in damaged) == whole


def test_without_blake3(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A core that is installed alone hashes with SHA-256, and says what reading BLAKE3 needs."""
    monkeypatch.setitem(sys.modules, "blake3", None)
    ran = CliRunner().invoke(cli, ["check", str(written / "net.msgpack")])
    assert isinstance(ran.exception, MissingExtra)
    assert "zooconvert[blake3]" in str(ran.exception)
    monkeypatch.setattr(hashes, "find_spec", lambda name: None)
    made = convert.convert(written / "net.flax", tmp_path / "b.safetensors")
    assert made.hash == "sha256"
    assert convert.check(tmp_path / "b.safetensors").intact
    monkeypatch.undo()
    assert convert.check(tmp_path / "b.safetensors").intact


def test_unverified_has_no_hashes(written: Path, tmp_path: Path) -> None:
    made = convert.convert(written / "net.flax", tmp_path / "b.safetensors", verify=False)
    assert made.hash == ""
    assert not any(r.target_hashes for r in made.tensors)
    with pytest.raises(UsageError, match="--no-verify"):
        convert.check(tmp_path / "b.safetensors")


def test_a_file_is_gone(written: Path, tmp_path: Path) -> None:
    path = copied(written, "net.safetensors", tmp_path)
    (tmp_path / "net.safetensors.optimizer.safetensors").unlink()
    assert convert.check(path).damaged == ["optimizer.safetensors: it is missing"]


def test_a_certificate_that_was_changed(written: Path, tmp_path: Path) -> None:
    path = copied(written, "net.msgpack", tmp_path)
    file = tmp_path / "net.msgpack.certificate.json"
    text = file.read_text()
    file.write_text(text.replace('"verified"', '"verifled"'))
    with pytest.raises(CorruptInput, match="cannot be understood"):
        convert.check(path)
    file.write_text(text.replace('"level": "bits"', '"level": "none"'))
    assert convert.check(path).damaged == [f"{file.name}: it was changed since it was written"]
    file.unlink()
    with pytest.raises(UsageError, match="there is no certificate"):
        convert.check(path)


def test_command(written: Path, tmp_path: Path) -> None:
    path = copied(written, "net.flax", tmp_path)
    done = CliRunner().invoke(cli, ["check", str(path)])
    assert done.exit_code == 0
    assert done.output.startswith(f"intact: {path}, ")
    config = path / "config.json"
    config.write_text(config.read_text() + " ")
    done = CliRunner().invoke(cli, ["check", "--json", str(path)])
    assert isinstance(done.exception, CorruptInput)
    assert json.loads(done.stdout)["damaged"] == [
        "config.json: it was changed since it was written"
    ]
