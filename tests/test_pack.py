"""A checkpoint as a wheel: installed by pip, loaded by name, refused with reasons."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import bits, canonical, write

import convert
import zoo
from zoo.card import Card, Score, read_card
from zoo.containers.errors import CorruptInput, UsageError
from zoo.containers.safetensors_file import SafetensorsReader, SafetensorsWriter
from zoo.models.bert import MODEL as BERT
from zoo.models.convnet import MODEL as CONVNET

CARD = {
    "data": "made up",
    "license": "CC0-1.0",
    "score": {"metric": "accuracy", "value": 0.9, "low": 0.8, "high": 0.95, "n": 50, "correct": 45},
    "seed": 7,
}
USE = """
import numpy as np, zoo
for framework in ("torch", "flax"):
    model = zoo.load("{name}", framework=framework)
    last = model.fc3.weight.detach() if framework == "torch" else model.fc3.kernel.get_value()
    print(framework, float(np.abs(np.asarray(last)).sum()))
"""


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return canonical(CONVNET, CONVNET.presets["cifar_net"])


@pytest.fixture
def checkpoint(tmp_path: Path, weights: dict[str, np.ndarray]) -> Path:
    path = tmp_path / "trained.pt"
    state = {f"module.{n}": torch.from_numpy(a) for n, a in weights.items()}
    torch.save({"epoch": 4, "state_dict": state}, path)
    return path


def environment(folder: Path, wheel: Path) -> Path:
    """A fresh environment with the wheel, which sees the packages of this one."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = next(folder.glob("lib/python*/site-packages"))
    here = [p for p in sys.path if p.endswith("site-packages")] + [
        str(Path(zoo.__file__).parents[1])
    ]
    (site / "here.pth").write_text("\n".join(here))
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index"]
    subprocess.run([*command, "--no-deps", "-q", str(wheel)], check=True)
    return python


@pytest.mark.parametrize("name", ["cifar_net.mine", "our_net"])
def test_a_wheel_is_installed_and_loaded_by_name_in_both_frameworks(
    tmp_path: Path, checkpoint: Path, weights: dict[str, np.ndarray], name: str
) -> None:
    packed = convert.pack(checkpoint, name, tmp_path, card=CARD)
    python = environment(tmp_path / "env", packed.path)
    code = [python, "-c", USE.format(name=name)]
    run = subprocess.run(code, capture_output=True, text=True, check=True)
    totals = {line.split()[0]: float(line.split()[1]) for line in run.stdout.splitlines()}
    expected = float(np.abs(weights["fc3.weight"]).sum())
    assert totals == pytest.approx({"torch": expected, "flax": expected}, rel=1e-5)


def test_what_is_in_the_wheel(
    tmp_path: Path, checkpoint: Path, weights: dict[str, np.ndarray]
) -> None:
    packed = convert.pack(checkpoint, "cifar_net.mine", tmp_path, card=CARD, version="2.1")
    assert packed.path.name == "zooconvert_weights_cifar_net_mine-2.1-py3-none-any.whl"
    with zipfile.ZipFile(packed.path) as archive:
        archive.extractall(tmp_path / "x")
        names = set(archive.namelist())
    inner = tmp_path / "x" / "zooconvert_weights_cifar_net_mine"
    record = tmp_path / "x" / "zooconvert_weights_cifar_net_mine-2.1.dist-info" / "RECORD"
    assert {line.split(",")[0] for line in record.read_text().splitlines()} == names
    with SafetensorsReader(inner / "cifar_net.mine.safetensors") as reader:
        assert {n: bits(reader.read(n)) for n in reader.tensors} == {
            n: bits(a) for n, a in weights.items()
        }
    card = read_card(inner / "cifar_net.mine.safetensors")
    assert card is not None
    assert card.score == Score(**CARD["score"])  # type: ignore[arg-type]
    assert (card.license, card.seed, card.sha256) == ("CC0-1.0", 7, packed.card.sha256)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "left behind"


def test_equal_input_gives_equal_bytes_but_for_the_certificate(
    tmp_path: Path, checkpoint: Path
) -> None:
    card = {"created": "2026-01-01", "versions": {"python": "3"}}
    a = convert.pack(checkpoint, "our_net", tmp_path, card=card)
    (tmp_path / "again").mkdir()
    b = convert.pack(checkpoint, "our_net", tmp_path / "again", card=card)
    with zipfile.ZipFile(a.path) as x, zipfile.ZipFile(b.path) as y:
        assert x.namelist() == y.namelist()
        for name in x.namelist():
            if "certificate" not in name and "RECORD" not in name:
                assert x.read(name) == y.read(name), name


def test_a_flax_checkpoint_and_a_cast(tmp_path: Path, checkpoint: Path) -> None:
    convert.convert(checkpoint, tmp_path / "m.msgpack")
    packed = convert.pack(tmp_path / "m.msgpack", "our_net", tmp_path, dtype="bfloat16")
    with zipfile.ZipFile(packed.path) as archive:
        path = archive.extract("zooconvert_weights_our_net/our_net.safetensors", tmp_path / "x")
    with SafetensorsReader(Path(path)) as reader:
        assert {t.dtype for t in reader.tensors.values()} == {"BF16"}
    assert read_card(tmp_path / "nothing.safetensors") is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Mine", {}, "cannot be the name"),
        ("a.b.c", {}, "cannot be the name"),
        ("../x", {}, "cannot be the name"),
        ("mnist_cnn", {}, "model's own name"),
        ("convnet", {}, "model's own name"),
        ("mnist_cnn.digits", {}, "weights that come with"),
        ("mnist_cnn.mine", {}, "call it cifar_net.mine"),
        ("our_net", {"version": "one"}, "not a version"),
        ("our_net", {"card": {"licence": "MIT"}}, "a card has no licence"),
        ("our_net", {"card": {"score": {"accuracy": 1}}}, "the score is not one"),
        ("our_net", {"card": "missing.json"}, "missing.json"),
        ("our_net", {"out": "missing"}, "does not exist"),
    ],
)
def test_refusals(tmp_path: Path, checkpoint: Path, name: str, options: Any, message: str) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match=message):
        convert.pack(checkpoint, name, **{"out": tmp_path, **options})
    assert sorted(tmp_path.iterdir()) == before


def test_what_nobody_could_load_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bert.safetensors"
    config = next(iter(BERT.tiny.values()))
    write(SafetensorsWriter, path, canonical(BERT, config))
    with pytest.raises(UsageError, match="num_attention_heads"):
        convert.pack(path, "our_bert", tmp_path)


def test_an_existing_wheel_needs_force(tmp_path: Path, checkpoint: Path) -> None:
    convert.pack(checkpoint, "our_net", tmp_path)
    with pytest.raises(UsageError, match="exists already"):
        convert.pack(checkpoint, "our_net", tmp_path)
    convert.pack(checkpoint, "our_net", tmp_path, force=True)


def test_a_card_that_is_no_json(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "card.json").write_text("{")
    with pytest.raises(UsageError, match="not JSON"):
        convert.pack(checkpoint, "our_net", tmp_path, card=tmp_path / "card.json")
    with pytest.raises(CorruptInput, match="not JSON"):
        read_card(tmp_path / "card.safetensors")
    (tmp_path / "card.json").write_text("[]")
    with pytest.raises(CorruptInput, match="not a JSON object"):
        read_card(tmp_path / "card.safetensors")
    card = Card("x", score=Score("accuracy", 0.5, 0.4, 0.6, 10))
    assert Card.from_dict(json.loads(card.to_json()), "x") == card
