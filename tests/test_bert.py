"""BERT: old spellings, padding, and the config.json files of upstream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from support import canonical
from upstream import load
from upstream.bert import UPSTREAM

import zoo
from convert.compare.outputs import run
from convert.judge.noise import EXACT
from zoo.loading import build
from zoo.models.bert import MODEL
from zoo.models.bert.config import from_hf, to_hf


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


@pytest.mark.slow
def test_the_padding_row_gets_the_gradient_that_upstream_gives_it() -> None:
    config = MODEL.tiny["masked_lm"]
    inputs = MODEL.inputs(config)
    inputs["input_ids"][:, -2:] = 0
    given = {k: torch.from_numpy(v) for k, v in inputs.items()}
    theirs = load(UPSTREAM.make(config), MODEL, config).double()
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
