"""A checkpoint against its certificate: whatever rots is found, and named."""

from __future__ import annotations

import json
import shutil
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
from zoo.checkpoint.certificate import Certificate
from zoo.checkpoint.label import Label
from zoo.containers.errors import CorruptInput, UsageError
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


@pytest.mark.parametrize("hashed", [True, False])
def test_what_is_damaged_is_named(written: Path, hashed: bool, tmp_path: Path) -> None:
    """Also by a certificate of --no-verify, which has no hashes of files."""
    path = copied(written, "net.safetensors", tmp_path)
    certificate = tmp_path / "net.safetensors.certificate.json"
    if not hashed:
        made = Certificate.read(certificate)
        made.files = {}
        certificate.write_text(made.to_json())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    moments = tmp_path / "net.safetensors.optimizer.safetensors"
    data = bytearray(moments.read_bytes())
    data[-1] ^= 1
    moments.write_bytes(data)
    *files, tensor, moment = convert.check(path).damaged
    changed = "it was changed since it was written"
    wanted = [f"net.safetensors: {changed}", f"optimizer.safetensors: {changed}"]
    assert files == (wanted if hashed else [])
    assert tensor.endswith(": its bytes are others")
    assert moment.startswith(f"{moments.name}: ")
    with pytest.raises(CorruptInput, match="things differ"):
        zoo.load(path, "torch", check_hashes=True)
    zoo.load(path, "torch")


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
    earlier = json.loads(text)
    del earlier["sha256"], earlier["files"]
    file.write_text(json.dumps(earlier, indent=1))
    assert convert.check(path).intact, "of an earlier version"
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
