"""The Transformer: torch.nn.Transformer as its middle, ties, masks and positions."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file
from support import Arrays, canonical

import zoo
from convert.judge.noise import EXACT, MARGIN
from convert.judge.rows import FLOOR
from zoo.loading import build
from zoo.models.transformer import MODEL
from zoo.nn import (
    positions_flax,
    positions_torch,
)

TIED, SEPARATE = MODEL.tiny["tied"], MODEL.tiny["two_vocabularies"]
FRAMEWORKS = pytest.mark.parametrize("framework", ["torch", "flax"])


def judge(got: Arrays, exact: np.ndarray, rough: np.ndarray) -> None:
    scale = np.abs(exact).max()
    assert np.abs(got["float64"] - exact).max() <= EXACT * scale
    noise = np.abs(rough - exact).max()
    assert np.abs(got["float32"] - rough).max() <= MARGIN * max(noise, FLOOR * scale)


@FRAMEWORKS
def test_golden(fixtures: Path, framework: str) -> None:
    golden = load_file(fixtures / "golden" / "transformer.safetensors")
    weights = canonical(MODEL, TIED)

    def inner(module: Any, src: Any, tgt: Any) -> Any:
        memory = module.decoder.keys_values(module.encoder(src, None))
        return module.decoder(tgt, memory, None, None, None, 0)[0]

    got = {}
    for precision in ("float64", "float32"):
        src, tgt = (golden[f"in.{n}"].astype(precision) for n in ("src", "tgt"))
        with jax.enable_x64(True), jax.default_matmul_precision("highest"), torch.no_grad():
            module = build(MODEL, TIED, framework, weights, param_dtype=precision)
            if framework == "torch":
                got[precision] = inner(module, torch.from_numpy(src), torch.from_numpy(tgt)).numpy()
            else:
                got[precision] = np.asarray(
                    nnx.jit(inner)(module, jnp.asarray(src), jnp.asarray(tgt))
                )
    judge(got, golden["out.f64"], golden["out.f32"])


def test_the_state_dict_is_torch_nn_transformers() -> None:
    mine = build(MODEL, TIED, "torch", canonical(MODEL, TIED)).state_dict()
    own = {"src_embedding", "tgt_embedding", "generator"}
    inner = {n: t.shape for n, t in mine.items() if n.partition(".")[0] not in own}
    theirs = torch.nn.Transformer(32, 4, 2, 2, 48, batch_first=True).state_dict()
    assert inner == {n: t.shape for n, t in theirs.items()}
    assert list(inner) == list(theirs)


def test_tied_matrices_are_one(tmp_path: Path) -> None:
    torch_twin = zoo.create("transformer_small", framework="torch")
    assert torch_twin.generator.weight is torch_twin.src_embedding.weight
    assert torch_twin.tgt_embedding.weight is torch_twin.src_embedding.weight
    flax_twin = zoo.create("transformer_small", framework="flax")
    names = {".".join(map(str, p)) for p, _ in nnx.to_flat_state(nnx.state(flax_twin, nnx.Param))}
    assert "src_embedding.embedding" in names
    assert not names & {"tgt_embedding.embedding", "generator.kernel"}
    shapes = MODEL.layout_of(TIED).shapes("nnx")
    renamed = {n.replace("embedding.embedding", "embedding.weight"): s for n, s in shapes.items()}
    fields = MODEL.infer(renamed)
    assert fields is not None
    assert fields["tie_embeddings"]
    assert fields["tgt_vocab_size"] == TIED.tgt_vocab_size


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nhead": 5}, "multiple"),
        ({"activation": "mish"}, "mish"),
        ({"tgt_vocab_size": 5}, "one vocabulary"),
    ],
)
def test_impossible_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TIED, **fields)


def test_other_models_are_not_taken_for_it() -> None:
    shapes = MODEL.layout_of(TIED).shapes("torch")
    assert MODEL.infer(shapes) is not None
    assert MODEL.infer(shapes | {"classifier.weight": (2, 32)}) is None
    encoder = {n: s for n, s in shapes.items() if n.startswith("encoder.")}
    assert MODEL.infer(encoder) is None


SMALL = MODEL.tiny["norm_first"]


@pytest.fixture(scope="module")
def calls() -> dict[str, Any]:
    """A function of inputs to logits for either framework, compiled once."""
    weights = canonical(MODEL, SMALL)
    torch_twin = build(MODEL, SMALL, "torch", weights)
    graph, state = nnx.split(build(MODEL, SMALL, "flax", weights))
    jitted = jax.jit(lambda state, inputs: nnx.merge(graph, state)(**inputs))

    def call_torch(inputs: Arrays) -> np.ndarray:
        return torch_twin(**{k: torch.from_numpy(v) for k, v in inputs.items()}).detach().numpy()

    return {"torch": call_torch, "flax": lambda inputs: np.asarray(jitted(state, inputs))}


@FRAMEWORKS
def test_masks_hide_what_they_say(calls: dict[str, Any], framework: str) -> None:
    call, inputs = calls[framework], MODEL.inputs(SMALL)
    inputs["memory_key_padding_mask"] = inputs["src_key_padding_mask"]
    before = call(inputs)
    src, tgt = inputs["src"].copy(), inputs["tgt"].copy()
    src[inputs["src_key_padding_mask"]] = 5
    assert (call(inputs | {"src": src}) == before).all(), "padding of the source is seen"
    tgt[:, 4:] = 5
    after = call(inputs | {"tgt": tgt})
    assert (after[:, :4] == before[:, :4]).all(), "a later token is seen"
    assert (after[:, 4:] != before[:, 4:]).any()
    open_memory = np.zeros_like(inputs["src_key_padding_mask"])
    after = call(inputs | {"memory_key_padding_mask": open_memory})
    assert (after[0] == before[0]).all()
    assert (after[1] != before[1]).all()
    hidden = call(inputs | {"memory_key_padding_mask": ~open_memory})
    assert np.isfinite(hidden).all()


def test_dropout_acts_in_training_only(calls: dict[str, Any]) -> None:
    inputs = MODEL.inputs(SMALL)
    given = {k: torch.from_numpy(v) for k, v in inputs.items()}
    torch_twin = build(MODEL, SMALL, "torch", canonical(MODEL, SMALL)).train()
    flax_twin = build(MODEL, SMALL, "flax", canonical(MODEL, SMALL))
    flax_twin.train()
    layer = flax_twin.encoder.layers[0]
    x = jnp.ones((1, 3, SMALL.d_model))
    jitted = nnx.jit(lambda layer: layer(x, None))  # one layer: it compiles sooner
    for call in (lambda: torch_twin(**given).detach().numpy(), lambda: np.asarray(jitted(layer))):
        assert (call() != call()).any()
    for framework in ("torch", "flax"):
        assert (calls[framework](inputs) == calls[framework](inputs)).all()


# --- The transformations of either framework ---


def test_jit_grad_and_vmap(calls: dict[str, Any]) -> None:
    inputs = MODEL.inputs(SMALL)
    graph, params, rest = nnx.split(
        build(MODEL, SMALL, "flax", canonical(MODEL, SMALL)), nnx.Param, ...
    )

    @jax.jit
    @jax.value_and_grad
    def loss(params: Any) -> Any:
        def one(inputs: Any) -> Any:
            batch = {k: v[None] for k, v in inputs.items()}
            return nnx.merge(graph, params, rest)(**batch)[0]

        return jnp.square(jax.vmap(one)(inputs)).sum()

    value, gradients = loss(params)
    assert abs(value - np.square(calls["flax"](inputs)).sum()) <= 1e-5 * value
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(gradients))


def test_export() -> None:
    config = MODEL.tiny["norm_first"]
    model = build(MODEL, config, "torch", canonical(MODEL, config))
    inputs = {k: torch.from_numpy(v) for k, v in MODEL.inputs(config).items()}
    exported = torch.export.export(model, (), inputs)
    assert torch.equal(exported.module()(**inputs), model(**inputs))


def test_positions_are_the_papers() -> None:
    table = positions_torch.sinusoids(torch.arange(50), 50, 16, torch.float64).numpy()
    assert abs(table[7, 4] - math.sin(7 / 10000 ** (4 / 16))) < 1e-12
    assert abs(table[7, 5] - math.cos(7 / 10000 ** (4 / 16))) < 1e-12
    rough = np.asarray(positions_flax.sinusoids(jnp.arange(50), 60, 16, jnp.float32))
    assert np.abs(rough - table).max() <= 2.0**-24
