"""Conversions end to end: containers, trees, dtypes, ties, and what is on disk if one fails."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file
from support import Arrays, bits, canonical, every_tiny, write

import convert
import zoo
from convert.api import plan
from convert.cli.main import cli
from convert.engine.workplace import Leftover, workplace
from zoo.checkpoint import hashes
from zoo.checkpoint.certificate import Certificate
from zoo.checkpoint.label import Label
from zoo.containers import open_checkpoint
from zoo.containers.base import TensorInfo
from zoo.containers.errors import NoSpace, NotEquivalent, UsageError, ZooError
from zoo.containers.orbax_dir import OrbaxReader, OrbaxWriter
from zoo.containers.safetensors_file import SafetensorsWriter
from zoo.model import Config, Model
from zoo.models.bert import MODEL

CONFIG = MODEL.tiny["encoder"]


def source(folder: Path, arrays: Arrays | None = None, config: Config = CONFIG) -> Path:
    """A PyTorch checkpoint with its config.json, in a directory of its own."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(Label(MODEL, config).to_config_json())
    return write(
        SafetensorsWriter, folder / "model.safetensors", arrays or canonical(MODEL, config)
    )


def contents(path: Path) -> dict[str, tuple[Any, ...]]:
    with open_checkpoint(path, "flax") as reader:
        return {name: bits(reader.read(name)) for name in reader.tensors}


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# --- There and back ---


@every_tiny()
@pytest.mark.parametrize("tree", ["nnx", "linen"])
@pytest.mark.parametrize("to", ["orbax", "msgpack", "safetensors"])
@pytest.mark.parametrize("back", ["safetensors", "pt"])
def test_there_and_back(
    model: Model, config: Config, to: str, tree: Any, back: str, tmp_path: Path
) -> None:
    arrays = canonical(model, config)
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.json").write_text(Label(model, config).to_config_json())
    src = write(SafetensorsWriter, folder / "model.safetensors", arrays)
    suffix = {"orbax": "", "msgpack": ".msgpack", "safetensors": ".safetensors"}[to]
    flax, dst = tmp_path / f"b{suffix}", tmp_path / f"c.{back}"
    there = convert.convert(src, flax, to, framework="flax", tree=tree)
    assert there.verified["level"] == "bits"
    assert there.config == dataclasses.asdict(config)
    again = convert.convert(flax, dst, back, framework="torch")
    assert again.source_tree == tree
    expected = {n: bits(a) for n, a in arrays.items()}
    result = contents(dst)
    shapes = model.layout_of(config).shapes("torch")
    extra = {n for n in shapes if n not in arrays}  # ties and constants
    if back == "pt":
        assert result.keys() == shapes.keys(), "a strict load_state_dict takes it"
        module = model.definition("torch")(config)
        module.load_state_dict(torch.load(dst, weights_only=True), strict=True)
    assert {n: result[n] for n in expected} == expected
    assert result.keys() - expected.keys() <= extra


FLOATS = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
FLOATS += ["float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]


@pytest.mark.parametrize(
    ("dtype", "to"), [(d, to) for d in FLOATS for to in ("msgpack", "safetensors", "orbax")]
)
def test_every_bit_pattern_of_every_dtype_returns(dtype: str, to: str, tmp_path: Path) -> None:
    """Random bits, so that NaN payloads, infinities, subnormals and -0 are among them."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    rng = np.random.default_rng(0)
    arrays = {
        n: np.frombuffer(rng.bytes(a.size * kind.itemsize), kind).reshape(a.shape)
        for n, a in canonical(MODEL, CONFIG).items()
    }
    src = source(tmp_path / "a", arrays)
    convert.convert(src, tmp_path / "b", to, framework="flax")
    found = next(p for p in tmp_path.glob("b*") if "." not in p.name or p.suffix == f".{to}")
    if found.is_dir() and to == "msgpack":
        found = next(found.glob("*.msgpack"))
    convert.convert(found, tmp_path / "c.safetensors", framework="torch")
    result = contents(tmp_path / "c.safetensors")
    assert result == {n: bits(a) for n, a in arrays.items()}


def test_a_cast_is_the_one_asked_for(tmp_path: Path) -> None:
    src = source(tmp_path / "a")
    made = convert.convert(src, tmp_path / "b.msgpack", dtype="bfloat16")
    assert made.verified["level"] == "bits"
    with open_checkpoint(tmp_path / "b.msgpack") as reader:
        kernel = reader.read("pooler.dense.kernel")
    expected = canonical(MODEL, CONFIG)["pooler.dense.weight"].T.astype(ml_dtypes.bfloat16)
    assert bits(kernel) == bits(expected)


def test_minilm(minilm: Path, tmp_path: Path) -> None:
    """The real one, with no argument but the file: identified, and restored by Orbax itself."""
    import orbax.checkpoint.experimental.v1 as ocp
    from transformers import BertModel

    for name in ("model.safetensors", "config.json"):
        shutil.copy(minilm / name, tmp_path)
    made = convert.convert(tmp_path / "model.safetensors")
    assert made.target == "model.flax"
    assert (made.model, made.target_container) == ("bert", "orbax")
    flax = tmp_path / "model.flax"
    assert json.loads((flax / "config.json").read_text())["num_attention_heads"] == 12
    certificate = Certificate.read(flax / "certificate.json")
    assert len(certificate.tensors) == 104
    tree = ocp.load(flax)
    original = load_file(minilm / "model.safetensors")
    kernel = tree["encoder"]["layer"]["3"]["attention"]["self"]["query"]["kernel"]
    assert (np.asarray(kernel) == original["encoder.layer.3.attention.self.query.weight"].T).all()
    back = tmp_path / "back"
    back.mkdir()
    convert.convert(flax, back / "model.safetensors")
    returned = load_file(back / "model.safetensors")
    assert {n: bits(a) for n, a in returned.items()} == {n: bits(a) for n, a in original.items()}
    shutil.copy(minilm / "config.json", back)
    loaded = BertModel.from_pretrained(back)
    assert (loaded.pooler.dense.weight.detach().numpy() == original["pooler.dense.weight"]).all()


def test_a_converted_directory_is_accepted_by_transformers(minilm: Path, tmp_path: Path) -> None:
    """Its own config.json and all: nothing has to be copied beside it."""
    from transformers import BertModel

    convert.convert(minilm, tmp_path / "flax")
    convert.convert(tmp_path / "flax", tmp_path / "torch", max_shard_size=30_000_000)
    assert (tmp_path / "torch" / "model.safetensors.index.json").is_file()
    loaded, info = BertModel.from_pretrained(tmp_path / "torch", output_loading_info=True)
    assert not info["missing_keys"]
    assert loaded.config.num_attention_heads == 12
    assert loaded.config.model_type == "bert"


# --- Flax checkpoints of others ---


@pytest.mark.parametrize("to", ["safetensors", "pt"])
def test_flax_bert_of_transformers_4(fixtures: Path, to: str, tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    folder = fixtures / "hf_flax_v4" / "bert_classifier"
    dst = tmp_path / f"model.{to}"
    made = convert.convert(folder / "flax_model.msgpack", dst, to, framework="torch")
    assert made.source_tree == "nnx"
    expected = load_file(folder / "model.safetensors")
    result = contents(dst)
    assert {n: result[n] for n in expected} == {n: bits(a) for n, a in expected.items()}
    assert result.keys() == expected.keys()
    io = load_file(folder / "io.safetensors")
    given = {k.removeprefix("in."): torch.from_numpy(v) for k, v in io.items() if k != "out"}
    with torch.no_grad():
        mine = zoo.load(dst, framework="torch")(**given).numpy()
        if to == "safetensors":
            shutil.copy(folder / "config.json", tmp_path)
            theirs = BertForSequenceClassification.from_pretrained(tmp_path)(**given).logits
            assert np.abs(theirs.numpy() - io["out"]).max() < 1e-6
    assert np.abs(mine - io["out"]).max() < 1e-6
    flax = zoo.load(folder / "flax_model.msgpack", framework="flax")
    got = flax(**{k: v.numpy() for k, v in given.items()})
    assert np.abs(np.asarray(got) - io["out"]).max() < 1e-6


def test_a_train_state(tmp_path: Path) -> None:
    """What `flax.serialization.to_bytes(TrainState)` holds: weights below params, then Adam."""
    from flax import serialization

    from zoo.checkpoint.apply import apply
    from zoo.layout import between

    layout = MODEL.layout_of(CONFIG)
    arrays = canonical(MODEL, CONFIG)
    params: dict[str, Any] = {}
    for a, b in zip(layout.view("torch"), layout.view("nnx"), strict=True):
        if b.tensors:
            *path, leaf = b.tensors[0].name.split(".")
            node = params
            for part in path:
                node = node.setdefault(part, {})
            ops, _ = between(a, b)
            (node[leaf],) = apply(ops, [arrays[a.tensors[0].name]])
    state = {"step": 7, "params": params, "opt_state": {"0": {"count": np.int32(7), "mu": params}}}
    path = tmp_path / "state.msgpack"
    path.write_bytes(serialization.msgpack_serialize(state))
    convert.convert(path, tmp_path / "out.safetensors", framework="torch")
    result = contents(tmp_path / "out.safetensors")
    assert {n: result[n] for n in arrays} == {n: bits(a) for n, a in arrays.items()}


# --- Constants and ties ---


def test_constants_return_as_they_were(tmp_path: Path) -> None:
    ids = np.arange(40)[None]
    for name, value in {"a": ids, "b": ids[:, ::-1].copy()}.items():
        arrays = canonical(MODEL, CONFIG) | {"embeddings.position_ids": value}
        src = source(tmp_path / name, arrays)
        convert.convert(src, tmp_path / f"{name}.msgpack")
        convert.convert(tmp_path / f"{name}.msgpack", tmp_path / f"{name}.safetensors")
        assert contents(tmp_path / f"{name}.safetensors") == {n: bits(a) for n, a in arrays.items()}
    label = (tmp_path / "a.msgpack.config.json").read_text()
    assert "base64" not in label, "the stated value need not be kept"
    assert "base64" in (tmp_path / "b.msgpack.config.json").read_text()


def test_ties_are_checked_and_return_if_they_were_spelled_out(tmp_path: Path) -> None:
    config = MODEL.tiny["masked_lm"]
    plain = canonical(MODEL, config)
    words = plain["bert.embeddings.word_embeddings.weight"]
    spelled = plain | {"cls.predictions.decoder.weight": words}
    for name, arrays in {"plain": plain, "spelled": spelled}.items():
        src = source(tmp_path / name, arrays, config)
        convert.convert(src, tmp_path / f"{name}.msgpack")
        convert.convert(tmp_path / f"{name}.msgpack", tmp_path / f"{name}.safetensors")
        assert contents(tmp_path / f"{name}.safetensors").keys() == arrays.keys()
    assert "tied" in (tmp_path / "spelled.safetensors.certificate.json").read_text()
    # The matrix may stand alone, its bias may not.
    broken = plain | {"cls.predictions.decoder.bias": plain["cls.predictions.bias"] + 1}
    src = source(tmp_path / "broken", broken, config)
    with pytest.raises(ZooError, match="tied, but hold different values"):
        convert.convert(src, tmp_path / "broken.msgpack")
    with pytest.raises(ZooError, match="tied, but hold different values"):
        zoo.load(src, framework="torch")
    report = convert.verify(src, tmp_path / "plain.safetensors")
    assert [d.name for d in report.differences] == ["cls.predictions.decoder.bias"]
    assert not list(tmp_path.glob("*broken.msgpack*"))


def test_a_pt_file_shares_the_storage_of_ties(tmp_path: Path) -> None:
    config = MODEL.tiny["masked_lm"]
    convert.convert(source(tmp_path / "a", None, config), tmp_path / "b.msgpack")
    convert.convert(tmp_path / "b.msgpack", tmp_path / "c.pt")
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    words = state["bert.embeddings.word_embeddings.weight"]
    assert state["cls.predictions.decoder.weight"].data_ptr() == words.data_ptr()


def test_zero_sized_tensors_are_refused_by_orbax_and_kept_by_others(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, type_vocab_size=0)
    src = source(tmp_path / "a", None, config)
    with pytest.raises(UsageError, match=r"token_type_embeddings"):
        convert.convert(src, tmp_path / "b.orbax", "orbax")
    assert not list(tmp_path.glob("*b.orbax*"))
    convert.convert(src, tmp_path / "b.msgpack")
    convert.convert(tmp_path / "b.msgpack", tmp_path / "c.safetensors")
    assert contents(tmp_path / "c.safetensors") == contents(src)


# --- Targets ---


def test_defaults_lie_beside_the_source(tmp_path: Path) -> None:
    src = source(tmp_path / "in")
    convert.convert(src)
    assert (tmp_path / "in" / "model.flax" / "certificate.json").is_file()
    src.rename(tmp_path / "in" / "original.safetensors")
    convert.convert(tmp_path / "in" / "model.flax")
    assert contents(tmp_path / "in" / "model.safetensors") == contents(
        tmp_path / "in" / "original.safetensors"
    )


def test_an_existing_target_needs_force(tmp_path: Path) -> None:
    src = source(tmp_path / "a")
    for to, name in [("orbax", "b"), ("msgpack", "b.msgpack")]:
        target = tmp_path / name
        convert.convert(src, target, to)
        before = contents(target)
        with pytest.raises(UsageError, match="exists already"):
            convert.convert(src, target, to)
        half = {n: a / 2 for n, a in canonical(MODEL, CONFIG).items()}
        other = source(tmp_path / f"half_{to}", half)
        convert.convert(other, target, to, force=True)
        assert contents(target) != before
    assert not [f for f in files(tmp_path) if ".zooconvert-" in f]


def test_force_does_not_overwrite_what_is_no_checkpoint(tmp_path: Path) -> None:
    src = source(tmp_path / "a")
    notes = tmp_path / "notes.txt"
    notes.write_text("precious")
    with pytest.raises(UsageError, match="exists and is not a checkpoint"):
        convert.convert(src, notes, "msgpack", force=True)
    assert notes.read_text() == "precious"


def test_a_fine_tuned_head_beside_the_base_model_s_config_is_not_lost(tmp_path: Path) -> None:
    """The head's tensors are weights, whatever a config.json of the encoder says."""
    classifier = dataclasses.replace(MODEL.tiny["sequence_classification"], num_labels=3)
    arrays = canonical(MODEL, classifier)
    src = source(tmp_path / "a", arrays, MODEL.tiny["encoder"])  # the label of the base model
    made = convert.convert(src, tmp_path / "b.msgpack")
    assert made.config["head"] is None
    convert.convert(tmp_path / "b.msgpack", tmp_path / "c.safetensors")
    assert contents(tmp_path / "c.safetensors") == contents(src)
    with pytest.raises(UsageError, match="do not tell head"):
        zoo.load(src, framework="torch")
    with pytest.warns(zoo.LoadNotice, match="unknown: head"):
        model = zoo.load(src, framework="torch", head="sequence_classification")
    assert model.classifier.weight.shape == (3, 32)


def test_an_encoder_is_compared_with_itself_under_a_head(tmp_path: Path) -> None:
    config = MODEL.tiny["sequence_classification"]
    arrays = canonical(MODEL, config)
    bare = {n.removeprefix("bert."): a for n, a in arrays.items() if n.startswith("bert.")}
    report = convert.verify(
        source(tmp_path / "a", bare, MODEL.tiny["encoder"]),
        source(tmp_path / "b", arrays, config),
    )
    assert report.compared == len(bare)
    assert {d.name for d in report.differences} == {"classifier.weight", "classifier.bias"}


def test_a_directory_means_the_files_in_it_before_its_children(tmp_path: Path) -> None:
    src = source(tmp_path / "a")
    convert.convert(src)  # a/model.flax
    assert convert.inspect(src.parent).container == "safetensors"


def test_force_does_not_delete_what_is_no_checkpoint(tmp_path: Path) -> None:
    src = source(tmp_path / "a")
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    shutil.copy(src, home / "model.safetensors")  # a checkpoint among other things
    for force in (True, False):
        with pytest.raises(UsageError, match=r"more than a checkpoint: thesis\.tex") as caught:
            convert.convert(src, home, "orbax", force=force)
        assert "--force" not in caught.value.advice
    assert (home / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("name", ["a/model.safetensors", "a"])
def test_the_source_is_never_the_target(name: str, tmp_path: Path) -> None:
    src = source(tmp_path / "a")
    before = contents(src)
    with pytest.raises(UsageError, match="is the source, or one lies in the other"):
        convert.convert(src, tmp_path / name, framework="flax", force=True)
    assert contents(src) == before
    convert.convert(src, tmp_path / "b", "orbax")
    with pytest.raises(UsageError, match="is the source, or one lies in the other"):
        convert.convert(tmp_path / "b", tmp_path / "b" / "inside.safetensors")


def test_the_wrong_direction_is_recognised(tmp_path: Path) -> None:
    src = source(tmp_path / "a")
    with pytest.raises(UsageError, match="is a PyTorch checkpoint already"):
        convert.convert(src, tmp_path / "b.pt", framework="torch")
    convert.convert(src, tmp_path / "b.safetensors", framework="flax")
    with pytest.raises(UsageError, match="is a Flax checkpoint already"):
        convert.convert(tmp_path / "b.safetensors", tmp_path / "c.msgpack")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "pt", "framework": "flax"}, "pt is not a container of Flax"),
        ({"to": "msgpack", "framework": "torch"}, "msgpack is not a container of PyTorch"),
        ({"to": "npz"}, "no container 'npz'"),
        ({"tree": "haiku"}, "no tree 'haiku'"),
        ({"dtype": "int8"}, "not a floating-point dtype"),
        ({"to": "orbax", "max_shard_size": 5}, "only safetensors"),
        ({"model": "no_such"}, "no model is called"),
        ({"level": "vibes"}, "no level 'vibes'"),
    ],
)
def test_impossible_requests(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    src = source(tmp_path / "a")
    before = files(tmp_path)
    with pytest.raises(ZooError, match=message):
        convert.convert(src, **options)
    assert files(tmp_path) == before


# --- When it goes wrong ---


def test_a_failed_verification_leaves_the_old_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk or library that writes something else: found, told, and the old checkpoint kept."""
    src = source(tmp_path / "a")
    target = tmp_path / "b"
    convert.convert(src, target, "orbax")
    before = contents(target)
    write_ = OrbaxWriter._write

    def corrupt(self: OrbaxWriter, name: str, array: np.ndarray, region: Any) -> None:
        if name == "pooler.dense.kernel":
            array = array.copy()
            array.flat[5] += 1
        write_(self, name, array, region)

    monkeypatch.setattr(OrbaxWriter, "_write", corrupt)
    with pytest.raises(NotEquivalent, match=r"pooler\.dense\.kernel"):
        convert.convert(src, target, "orbax", force=True)
    assert contents(target) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_swap_that_bits_cannot_see_fails_level_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Query and key exchanged in the layout: there and back is exact, the model is another."""
    from zoo.layout import Layout

    config = MODEL.tiny["encoder"]
    src = source(tmp_path / "a", None, config)
    true = Layout.view

    def swapped(self: Layout, tree: Any) -> Any:
        views = true(self, tree)
        if tree != "nnx":
            return views
        at = {v.entry.torch[0].name: i for i, v in enumerate(views)}
        for leaf in ("weight", "bias"):
            i, j = (at[f"encoder.layer.0.attention.self.{p}.{leaf}"] for p in ("query", "value"))
            a, b = views[i], views[j]
            views[i] = dataclasses.replace(a, tensors=b.tensors)
            views[j] = dataclasses.replace(b, tensors=a.tensors)
        return views

    monkeypatch.setattr(Layout, "view", swapped)
    convert.convert(src, tmp_path / "blind.msgpack")  # bits alone do not see it
    with pytest.raises(NotEquivalent, match=r"encoder\.layer\.0\.attention"):
        convert.convert(src, tmp_path / "seen.msgpack", level="outputs")
    assert not list(tmp_path.glob("*seen*"))


def test_a_tie_that_was_not_written_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MODEL.tiny["masked_lm"]
    plain = canonical(MODEL, config)
    words = plain["bert.embeddings.word_embeddings.weight"]
    src = source(tmp_path / "a", plain | {"cls.predictions.decoder.weight": words}, config)
    convert.convert(src, tmp_path / "b.msgpack")
    write_ = SafetensorsWriter._write

    def zeros(self: SafetensorsWriter, name: str, array: np.ndarray, region: Any) -> None:
        write_(self, name, array * 0 if "decoder" in name else array, region)

    monkeypatch.setattr(SafetensorsWriter, "_write", zeros)
    with pytest.raises(NotEquivalent, match=r"decoder\.weight was not written"):
        convert.convert(tmp_path / "b.msgpack", tmp_path / "c.safetensors")


def test_level_outputs_in_both_directions(tmp_path: Path) -> None:
    src = source(tmp_path / "a")
    there = convert.convert(src, tmp_path / "b.msgpack", level="outputs")
    assert there.verified["worst"]["ratio"] < 8
    back = convert.convert(tmp_path / "b.msgpack", tmp_path / "c.pt", level="outputs")
    assert back.verified["level"] == "outputs"
    for options in ({"dtype": "bfloat16"}, {"verify": False}):
        with pytest.raises(UsageError, match="level 'outputs' compares with the source"):
            convert.convert(src, tmp_path / "d.msgpack", level="outputs", **options)


def test_configs_that_contradict_are_different(tmp_path: Path) -> None:
    src = source(tmp_path / "a")
    other = tmp_path / "b"
    other.mkdir()
    shutil.copy(src, other / "model.safetensors")
    config = dataclasses.replace(CONFIG, num_attention_heads=8, hidden_act="relu")
    (other / "config.json").write_text(Label(MODEL, config).to_config_json())
    report = convert.verify(src, other / "model.safetensors")
    assert report.verdict == "same"
    assert any("num_attention_heads 4 and 8" in n for n in report.notices)
    report = convert.verify(src, other / "model.safetensors", level="outputs", explain=0)
    assert report.verdict == "different"


def test_a_cast_out_of_range_is_told(tmp_path: Path) -> None:
    arrays = canonical(MODEL, CONFIG)
    arrays["pooler.dense.bias"][:3] = (1e6, -1e6, 7e4)
    src = source(tmp_path / "a", arrays)
    made = convert.convert(src, tmp_path / "b.msgpack", dtype="float16")
    assert "the cast made 3 values infinite or NaN: out of range" in made.notices
    with pytest.raises(UsageError, match="not a floating-point dtype"):
        convert.convert(src, tmp_path / "c.msgpack", dtype="F8_E8M0")


def test_what_others_wrote_stays(tmp_path: Path) -> None:
    """Labels of a classifier, a licence in the metadata: there and back."""
    config = MODEL.tiny["sequence_classification"]
    (tmp_path / "a").mkdir()
    hf = json.loads(Label(MODEL, config).to_config_json())
    del hf["zoo"]
    hf["id2label"] = {"0": "neg", "1": "neu", "2": "pos"}
    (tmp_path / "a" / "config.json").write_text(json.dumps(hf))
    src = write(
        SafetensorsWriter,
        tmp_path / "a" / "model.safetensors",
        canonical(MODEL, config),
        license="MIT",
    )
    convert.convert(src, tmp_path / "flax")
    assert json.loads((tmp_path / "flax" / "config.json").read_text())["id2label"]["2"] == "pos"
    convert.convert(tmp_path / "flax", tmp_path / "b.safetensors")
    convert.convert(tmp_path / "b.safetensors", tmp_path / "c")
    assert json.loads((tmp_path / "c" / "config.json").read_text())["id2label"]["2"] == "pos"
    with open_checkpoint(tmp_path / "b.safetensors") as reader:
        assert reader.metadata["license"] == "MIT"


def test_a_token_classifier_with_a_pooler_is_what_its_config_says(tmp_path: Path) -> None:
    config = dataclasses.replace(MODEL.tiny["token_classification"], pooler=True)
    src = source(tmp_path / "a", canonical(MODEL, config), config)
    hf = json.loads((tmp_path / "a" / "config.json").read_text())
    del hf["zoo"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(hf))
    convert.convert(src, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["architectures"] == [
        "BertForTokenClassification"
    ]
    (tmp_path / "a" / "config.json").unlink()
    made = convert.convert(src, tmp_path / "c")
    assert made.config["head"] is None, "names do not tell which classifier it is"


def test_directories_with_several_checkpoints_say_which_was_taken(fixtures: Path) -> None:
    folder = fixtures / "hf_flax_v4" / "bert_classifier"
    (notice,) = (n for n in convert.inspect(folder).notices if "took" in n)
    assert "took model.safetensors" in notice


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = source(tmp_path / "a")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(NoSpace, match=r"0\.00 GB free"):
        convert.convert(src, tmp_path / "b.msgpack")
    monkeypatch.undo()

    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)  # the disk fills up half way
    with pytest.raises(NoSpace, match="full"):
        convert.convert(src, tmp_path / "b.msgpack")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


KILLED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in the background
import convert
convert.convert(sys.argv[1], sys.argv[2], force=True, progress=lambda s, d, t: (
    (print(s, flush=True), os.kill(os.getpid(), int(sys.argv[4]))) if s == sys.argv[3] else None))
"""


@pytest.mark.parametrize("stage", ["convert", "verify"])
def test_killed_in_the_middle_the_old_target_is_whole(stage: str, tmp_path: Path) -> None:
    src = source(tmp_path / "a")
    target = tmp_path / "b.msgpack"
    convert.convert(src, target)
    before = contents(target)
    for signum in (signal.SIGKILL, signal.SIGINT):
        run = subprocess.run(
            [sys.executable, "-c", KILLED, str(src), str(target), stage, str(int(signum))],
            capture_output=True,
        )
        assert run.returncode != 0
        assert stage.encode() in run.stdout
        assert contents(target) == before
    (left,) = convert.clean(tmp_path)
    assert left.kind == "resumable", "the interrupted one's; the killed one's went before"


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    src = source(tmp_path / "a")
    stale = tmp_path / ".b.msgpack.zooconvert-stale"
    stale.mkdir()
    with workplace(tmp_path / "b.msgpack") as alive:
        convert.convert(src, tmp_path / "b.msgpack")
        assert not stale.exists()
        assert alive.exists(), "somebody is at work there"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a",
        "b.msgpack",
        "b.msgpack.certificate.json",
        "b.msgpack.config.json",
    ]


def test_clean_lists_and_removes_what_killed_ones_left(tmp_path: Path) -> None:
    stale = tmp_path / ".b.msgpack.zooconvert-stale"
    stale.mkdir()
    (stale / "b.msgpack").write_bytes(b"12345")
    with workplace(tmp_path / "c.msgpack") as alive:
        assert convert.clean(tmp_path, dry_run=True) == [Leftover(stale, 5, "dead")]
        done = CliRunner().invoke(cli, ["clean", str(tmp_path)])
        assert done.exit_code == 0
        assert done.output.splitlines() == [f"{stale}  5 B", "1 removed, 5 B"]
        assert alive.exists(), "somebody is at work there"
    assert not stale.exists()
    assert convert.clean(tmp_path) == []
    with pytest.raises(UsageError, match="is not a directory"):
        convert.clean(tmp_path / "nowhere")


def test_two_at_once_to_one_target(tmp_path: Path) -> None:
    """The first wins, the second is told; with --force the last wins, certificate and all."""
    src = source(tmp_path / "a")
    other = source(tmp_path / "o", {n: a / 2 for n, a in canonical(MODEL, CONFIG).items()})
    target = tmp_path / "b.msgpack"
    started: list[str] = []

    def second(stage: str, done: int, total: int) -> None:
        if stage == "verify" and not started:
            started.append(stage)
            convert.convert(other, target, force=target.exists())

    for winner in (other, src):
        started.clear()
        if winner is other:
            with pytest.raises(UsageError, match="exists already"):
                convert.convert(src, target, progress=second)
        else:
            convert.convert(src, target, force=True, progress=second)
        assert started
        assert convert.verify(winner, target).verdict == "same"
        record = Certificate.read(tmp_path / "b.msgpack.certificate.json").tensors[0]
        with open_checkpoint(target) as reader:
            found = hashes.of(hashes.best(), reader.read(record.target[0]))
            assert [found] == record.target_hashes


def test_a_source_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    """By mmap this would end the process; by pread it is an error like another."""
    src = source(tmp_path / "a")

    def truncate(stage: str, done: int, total: int) -> None:
        os.truncate(src, 5000)

    with pytest.raises(ZooError, match=r"ends \d+ bytes too early"):
        convert.convert(src, tmp_path / "b.msgpack", progress=truncate)
    assert not (tmp_path / "b.msgpack").exists()


# --- Certificates and verification ---


def test_the_certificate_names_every_tensor_with_its_hash(tmp_path: Path) -> None:
    from blake3 import blake3

    src = source(tmp_path / "a")
    convert.convert(src, tmp_path / "b.msgpack")
    found = Certificate.read(tmp_path / "b.msgpack.certificate.json")
    arrays = canonical(MODEL, CONFIG)
    assert {n for t in found.tensors for n in t.names} == set(arrays)
    record = next(t for t in found.tensors if t.names == ["pooler.dense.weight"])
    assert (record.op, record.target) == ("permute(1,0)", ["pooler.dense.kernel"])
    weight = arrays["pooler.dense.weight"]
    assert record.source_hashes == [blake3(weight.tobytes()).hexdigest()]
    assert record.target_hashes == [blake3(weight.T.tobytes()).hexdigest()]
    assert (found.hash, found.format) == ("blake3", 2)
    assert found.verified["tensors"] == len(arrays)
    assert "numpy" in found.versions


def test_verify_finds_one_flipped_bit(tmp_path: Path) -> None:
    src = source(tmp_path / "a")
    convert.convert(src, tmp_path / "b.msgpack")
    assert convert.verify(src, tmp_path / "b.msgpack").verdict == "same"
    arrays = canonical(MODEL, CONFIG)
    arrays["pooler.dense.weight"].view(np.uint32)[3, 4] ^= 1
    report = convert.verify(source(tmp_path / "c", arrays), tmp_path / "b.msgpack")
    assert report.verdict == "different"
    (difference,) = report.differences
    assert difference.name == "pooler.dense.weight"
    assert (difference.count, difference.first) == (1, (3, 4))
    assert 0 < difference.max_error < 1e-6
    assert json.loads(report.to_json())["verdict"] == "different"


def test_verify_outputs_of_another_model(tmp_path: Path) -> None:
    src = source(tmp_path / "a")
    arrays = canonical(MODEL, CONFIG)
    arrays["encoder.layer.1.output.dense.weight"] *= np.float32(1.01)
    other = source(tmp_path / "c", arrays)
    convert.convert(other, tmp_path / "d.msgpack")
    report = convert.verify(src, tmp_path / "d.msgpack", level="outputs")
    assert report.verdict == "different"
    bad = [r.name for r in report.outputs if not r.same]
    assert bad[0] == "encoder.layer.1.output.dense"
    assert report.worst.ratio > 8


def test_inspect_knows_what_it_sees(tmp_path: Path, minilm: Path) -> None:
    found = convert.inspect(minilm / "model.safetensors")
    assert found.models == ["bert (minilm_l6)"]
    assert len(found.tensors) == 104
    assert found.nbytes == sum(t.nbytes for t in found.tensors.values())
    other = write(SafetensorsWriter, tmp_path / "x.safetensors", {"a": np.zeros(3)})
    found = convert.inspect(other)
    assert not found.models
    assert "no model in the zoo" in found.why_not


def test_time_does_not_change_the_bytes(tmp_path: Path) -> None:
    src = source(tmp_path / "a")
    convert.convert(src, tmp_path / "b.msgpack")
    time.sleep(1.1)
    convert.convert(src, tmp_path / "c.msgpack")
    assert (tmp_path / "b.msgpack").read_bytes() == (tmp_path / "c.msgpack").read_bytes()


def test_orbax_metadata_and_reader_agree(tmp_path: Path) -> None:
    convert.convert(source(tmp_path / "a"), tmp_path / "b", "orbax")
    with OrbaxReader(tmp_path / "b") as reader:
        assert reader.tensors.keys() == MODEL.layout_of(CONFIG).shapes("nnx").keys()


def test_a_plan_counts_the_memory_of_running_the_twins(tmp_path: Path) -> None:
    src = source(tmp_path / "a")
    streamed = plan(src, tmp_path / "b.msgpack").memory
    with_twins = plan(src, tmp_path / "b.msgpack", level="outputs").memory
    values = sum(a.size for a in canonical(MODEL, CONFIG).values())
    assert with_twins >= values * 4 * 3 > streamed


def test_a_bare_state_dict_is_proved_at_outputs(tmp_path: Path) -> None:
    """No label and no config: what the names tell is enough for this family."""
    torch.save(zoo.create("mlp_10_20_10", framework="torch").state_dict(), tmp_path / "m.pt")
    made = convert.convert(tmp_path / "m.pt", tmp_path / "m.msgpack", level="outputs")
    assert made.verified["level"] == "outputs"
    report = convert.verify(tmp_path / "m.pt", tmp_path / "m.msgpack", level="outputs")
    assert report.verdict == "same"


@pytest.mark.parametrize("level", ["bits", "outputs"])
def test_a_tensor_written_with_another_dtype_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: Any
) -> None:
    """The same bytes under another name for them: hashes of bytes alone would not see it."""
    from zoo.containers import flax_msgpack

    src = source(tmp_path / "a")
    name = "encoder.layer.0.attention.self.query.kernel"
    begin, write = flax_msgpack.MsgpackWriter.__init__, flax_msgpack.MsgpackWriter.write

    def begin_wrong(self: Any, path: Path, header: Any, *rest: Any) -> None:
        begin(self, path, header | {name: TensorInfo("I32", header[name].shape)}, *rest)

    def write_wrong(self: Any, tensor: str, array: np.ndarray, region: Any = None) -> None:
        write(self, tensor, array.view(np.int32) if tensor == name else array, region)

    monkeypatch.setattr(flax_msgpack.MsgpackWriter, "__init__", begin_wrong)
    monkeypatch.setattr(flax_msgpack.MsgpackWriter, "write", write_wrong)
    with pytest.raises(NotEquivalent, match="not as they were meant"):
        convert.convert(src, tmp_path / "b.msgpack", level=level)
    assert not (tmp_path / "b.msgpack").exists()


def test_a_dry_run_of_a_level_counts_the_models(tmp_path: Path) -> None:
    src = source(tmp_path / "a")
    ran = CliRunner().invoke(
        cli,
        ["torch2flax", str(src), str(tmp_path / "b.msgpack"), "--dry-run", "--level", "outputs"],
    )
    assert ran.exit_code == 0
    assert "holds at least" in ran.output
