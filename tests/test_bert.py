"""BERT against upstream: golden outputs, transformers itself, and its published files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file
from support import Arrays, canonical

import zoo
from convert.compare.outputs import run
from convert.judge.noise import EXACT, MARGIN
from convert.judge.rows import FLOOR
from zoo import probe
from zoo.loading import build
from zoo.models.bert import MODEL
from zoo.models.bert.config import CLASSES, Config, from_hf, to_hf

HEADS = [pytest.param(c, id=n) for n, c in MODEL.tiny.items()]


@pytest.mark.parametrize("framework", ["torch", "flax"])
def test_golden(fixtures: Path, framework: str) -> None:
    golden = load_file(fixtures / "golden" / "bert.safetensors")
    config = Config(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
    )
    weights = probe.weights(MODEL.layout_of(config).shapes("torch"))
    inputs = {k.removeprefix("in."): v for k, v in golden.items() if k.startswith("in.")}
    with jax.enable_x64(True):
        exact = run(MODEL, config, framework, weights, inputs, "float64")
        rough = run(MODEL, config, framework, weights, inputs, "float32")
    for name in ("last_hidden_state", "pooler_output"):
        expected = golden[f"{name}.f64"]
        scale = np.abs(expected).max()
        assert np.abs(exact[f"output.{name}"] - expected).max() <= EXACT * scale
        noise = np.abs(golden[f"{name}.f32"] - expected).max()
        error = np.abs(rough[f"output.{name}"] - golden[f"{name}.f32"]).max()
        assert error <= MARGIN * max(noise, FLOOR * scale)


def upstream(config: Config) -> Any:
    """transformers' own model of this config, eager attention, in float64, name-seeded."""
    cls = getattr(transformers, CLASSES[config.head])
    hf = transformers.BertConfig(**to_hf(config), attn_implementation="eager")
    extra = {} if config.head != "none" else {"add_pooling_layer": config.pooler}
    module = cls(hf, **extra).double().eval()
    weights = {n: torch.from_numpy(a).double() for n, a in canonical(MODEL, config).items()}
    missing, surplus = module.load_state_dict(weights, strict=False)
    tied = {e.torch[0].name for e in MODEL.layout_of(config).entries if e.tied_to}
    assert set(missing) <= tied
    assert not surplus
    return module


@pytest.mark.parametrize("config", HEADS)
def test_twins_compute_what_transformers_computes(config: Config) -> None:
    module = upstream(config)
    inputs = MODEL.inputs(config)
    with torch.no_grad():
        expected = module(**{k: torch.from_numpy(v) for k, v in inputs.items()})
    fields = {
        "none": ["last_hidden_state", "pooler_output"],
        "pretraining": ["prediction_logits", "seq_relationship_logits"],
    }.get(config.head, ["logits"])
    with jax.enable_x64(True):
        for framework in ("torch", "flax"):
            got = run(MODEL, config, framework, canonical(MODEL, config), inputs, "float64")
            for field in fields:
                want = getattr(expected, field)
                if want is None:
                    assert f"output.{field}" not in got
                    continue
                have = got[f"output.{field}"] if len(fields) > 1 else got["output"]
                assert np.abs(have - want.numpy()).max() <= EXACT * want.abs().max().item()


@pytest.mark.parametrize("config", HEADS)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_what_transformers_saves_is_loaded(config: Config, safe: bool, tmp_path: Path) -> None:
    module = upstream(config).float()
    if safe:
        module.save_pretrained(tmp_path)
    else:
        module.config.save_pretrained(tmp_path)
        torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    expected = {k: v.numpy() for k, v in module.state_dict().items()}
    mine = zoo.load(tmp_path, framework="torch")
    assert {k: v.shape for k, v in mine.state_dict().items()} == {
        k: v.shape for k, v in expected.items()
    }
    for name, value in mine.state_dict().items():
        assert (value.numpy() == expected[name]).all()
    if config.head in ("masked_lm", "pretraining"):
        assert mine.cls.predictions.decoder.weight is mine.bert.embeddings.word_embeddings.weight
        assert mine.cls.predictions.decoder.bias is mine.cls.predictions.bias


def old_spelling(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    )


@pytest.mark.parametrize("framework", ["torch", "flax"])
def test_old_spellings_and_the_bert_prefix(framework: str, tmp_path: Path) -> None:
    config = MODEL.tiny["encoder"]
    weights = {n: torch.from_numpy(a) for n, a in canonical(MODEL, config).items()}
    torch.save({"bert." + old_spelling(n): t for n, t in weights.items()}, tmp_path / "old.bin")
    (tmp_path / "config.json").write_text(json.dumps(to_hf(config)))
    with pytest.warns(zoo.LoadNotice, match=r"bert\."):
        loaded = zoo.load(tmp_path / "old.bin", framework=framework)
    same = build(MODEL, config, framework, canonical(MODEL, config))
    inputs = MODEL.inputs(config)
    if framework == "torch":
        given = {k: torch.from_numpy(v) for k, v in inputs.items()}
        assert (loaded(**given).last_hidden_state == same(**given).last_hidden_state).all()
    else:
        assert (loaded(**inputs).last_hidden_state == same(**inputs).last_hidden_state).all()


@pytest.mark.parametrize("framework", ["torch", "flax"])
def test_a_new_head_keeps_everything_else_and_says_so(framework: str, tmp_path: Path) -> None:
    config = MODEL.tiny["encoder"]
    upstream(config).float().save_pretrained(tmp_path)
    with pytest.warns(zoo.LoadNotice) as told:
        model = zoo.load(
            tmp_path, framework=framework, head="token_classification", num_labels=7, pooler=False
        )
    text = "\n".join(str(w.message) for w in told)
    assert "new, not from the checkpoint: classifier.weight, classifier.bias" in text
    assert "not used: pooler.dense.weight, pooler.dense.bias" in text
    kernel = model.classifier.weight if framework == "torch" else model.classifier.kernel
    assert sorted(kernel.shape) == [7, 32]
    words = canonical(MODEL, config)["embeddings.word_embeddings.weight"]
    held = model.bert.embeddings.word_embeddings
    got = held.weight.detach().numpy() if framework == "torch" else held.embedding[...]
    assert (np.asarray(got) == words).all()


def test_a_new_head_starts_alike_in_both_frameworks(tmp_path: Path) -> None:
    upstream(MODEL.tiny["encoder"]).float().save_pretrained(tmp_path)
    with pytest.warns(zoo.LoadNotice):
        a = zoo.load(tmp_path, framework="torch", head="sequence_classification", num_labels=3)
    with pytest.warns(zoo.LoadNotice):
        b = zoo.load(tmp_path, framework="flax", head="sequence_classification", num_labels=3)
    assert (np.asarray(b.classifier.kernel[...]) == a.classifier.weight.detach().numpy().T).all()


@pytest.mark.parametrize("framework", ["torch", "flax"])
def test_computation_in_bfloat16_over_float32_parameters(framework: str) -> None:
    config = MODEL.tiny["encoder"]
    inputs: Arrays = MODEL.inputs(config)
    exact = run(MODEL, config, "torch", canonical(MODEL, config), inputs, "float32")
    model = build(MODEL, config, framework, canonical(MODEL, config), dtype="bfloat16")
    if framework == "torch":
        with torch.no_grad():
            out = model(**{k: torch.from_numpy(v) for k, v in inputs.items()}).last_hidden_state
        assert out.dtype == torch.bfloat16
        assert all(p.dtype == torch.float32 for p in model.parameters())
        got = out.float().numpy()
    else:
        out = model(**inputs).last_hidden_state
        assert out.dtype == jax.numpy.bfloat16
        assert model.pooler.dense.kernel.dtype == jax.numpy.float32
        got = np.asarray(out, np.float32)
    expected = exact["output.last_hidden_state"]
    gap = np.abs(got - expected).max() / np.abs(expected).max()
    assert 2.0**-12 < gap < 2.0**-4, "bfloat16 has 8 bits: coarser than that, finer than this"


@pytest.mark.parametrize("framework", ["torch", "flax"])
def test_masked_tokens_do_not_matter(framework: str) -> None:
    config = MODEL.tiny["encoder"]
    inputs = MODEL.inputs(config)
    padding = inputs["attention_mask"] == 0
    other = inputs | {"input_ids": np.where(padding, 5, inputs["input_ids"])}
    a, b = (
        run(MODEL, config, framework, canonical(MODEL, config), x, "float32")[
            "output.last_hidden_state"
        ]
        for x in (inputs, other)
    )
    assert (a[~padding] == b[~padding]).all()
    assert (a[padding] != b[padding]).any()


@pytest.mark.parametrize("framework", ["torch", "flax"])
def test_an_all_padding_row_is_finite(framework: str) -> None:
    config = MODEL.tiny["encoder"]
    inputs = MODEL.inputs(config)
    inputs["attention_mask"][1] = 0
    got = run(MODEL, config, framework, canonical(MODEL, config), inputs, "float32")
    assert all(np.isfinite(x).all() for x in got.values())


@pytest.mark.parametrize("framework", ["torch", "flax"])
def test_dropout_acts_in_training_only(framework: str) -> None:
    config = replace(MODEL.tiny["encoder"], hidden_dropout_prob=0.5)
    model = build(MODEL, config, framework, canonical(MODEL, config))
    given = MODEL.inputs(config)
    if framework == "torch":
        given = {k: torch.from_numpy(v) for k, v in given.items()}
    still = [np.asarray(model(**given).last_hidden_state.tolist()) for _ in range(2)]
    model.train()
    moving = [np.asarray(model(**given).last_hidden_state.tolist()) for _ in range(2)]
    assert (still[0] == still[1]).all()
    assert (moving[0] != moving[1]).any()


def test_a_real_config_json(minilm: Path) -> None:
    config = from_hf(json.loads((minilm / "config.json").read_text()))
    assert config == MODEL.presets["minilm_l6"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"is_decoder": True}, "is_decoder"),
        ({"hidden_act": "mish"}, "mish"),
        ({"num_attention_heads": 5}, "not divisible"),
    ],
)
def test_a_config_that_this_bert_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf(to_hf(MODEL.tiny["encoder"]) | change)


def test_the_padding_row_gets_the_gradient_that_upstream_gives_it() -> None:
    config = MODEL.tiny["masked_lm"]
    inputs = MODEL.inputs(config)
    inputs["input_ids"][:, -2:] = 0
    given = {k: torch.from_numpy(v) for k, v in inputs.items()}
    theirs = upstream(config)
    theirs(**given).logits.sin().sum().backward()
    expected = theirs.bert.embeddings.word_embeddings.weight.grad.numpy()
    mine = build(MODEL, config, "torch", canonical(MODEL, config), param_dtype="float64")
    mine(**given).sin().sum().backward()
    got = mine.bert.embeddings.word_embeddings.weight.grad.numpy()
    scale = np.abs(expected).max()
    assert np.abs(got - expected).max() <= EXACT * scale
    with jax.enable_x64(True):
        twin = build(MODEL, config, "flax", canonical(MODEL, config), param_dtype="float64")
        grads = nnx.grad(lambda m: jax.numpy.sin(m(**inputs)).sum())(twin)
        flax = np.asarray(grads["bert"]["embeddings"]["word_embeddings"]["embedding"][...])
    assert np.abs(flax - expected).max() <= EXACT * scale


@pytest.mark.parametrize("framework", ["torch", "flax"])
def test_too_long_a_sequence_is_refused(framework: str) -> None:
    config = MODEL.tiny["encoder"]
    model = build(MODEL, config, framework, canonical(MODEL, config))
    ids = np.zeros((1, 41), np.int64)
    with pytest.raises(ValueError, match="41 tokens, but max_position_embeddings is 40"):
        model(torch.from_numpy(ids) if framework == "torch" else ids)
