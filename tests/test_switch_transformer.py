"""The Switch Transformer: sparse layers, routing, and parts of it against transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from generators import GENERATORS, STEPS
from safetensors.numpy import load_file
from support import canonical
from transformers.models.switch_transformers import modeling_switch_transformers as hf
from upstream import load
from upstream.switch_transformer import make

import convert
import zoo
from convert.compare.outputs import run
from convert.runtime.arrays import named_outputs
from zoo import probe
from zoo.loading import build
from zoo.models.switch_transformer import MODEL
from zoo.models.switch_transformer.config import Config, from_hf, to_hf
from zoo.nn import routing_flax, routing_torch
from zoo.nn.attention_torch import relative_bucket
from zoo.nn.relative_positions import bucket_table

TIED, DROPPING = MODEL.tiny["tied"], MODEL.tiny["dropping"]
GENERATOR = GENERATORS["switch_transformer"]
FRAMEWORKS = pytest.mark.parametrize("framework", ["torch", "flax"])


def test_losses_follow_the_paper() -> None:
    logits = [probe.normal("a", (2, 5, 3)), probe.normal("b", (2, 5, 3))]
    joined = np.concatenate(logits, 1)
    p = np.exp(joined) / np.exp(joined).sum(-1, keepdims=True)
    share = np.eye(3)[joined.argmax(-1)].mean(1)
    expected = (
        (np.log(np.exp(joined).sum(-1)) ** 2).mean(),
        (3 * (share * p.mean(1)).sum(-1)).mean(),
    )
    theirs = hf.load_balancing_loss_func(torch.from_numpy(p), torch.from_numpy(joined.argmax(-1)))
    assert abs(expected[1] - theirs.item()) < 1e-6
    x = torch.zeros((), dtype=torch.float64)
    got = routing_torch.router_losses([torch.from_numpy(a) for a in logits], x)
    assert np.allclose([a.item() for a in got], expected, rtol=1e-12, atol=0)
    assert [a.item() for a in routing_torch.router_losses([], x)] == [0, 0]
    rough = routing_flax.router_losses([jnp.asarray(a, jnp.float32) for a in logits], jnp.zeros(()))
    assert np.allclose([a.item() for a in rough], expected, rtol=1e-6, atol=0)
    assert [a.item() for a in routing_flax.router_losses([], jnp.zeros(()))] == [0, 0]


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_upstreams(bidirectional: bool) -> None:
    settings = [(n, d) for n in (4, 6, 8, 20, 32, 64) for d in (9, 16, 40, 64, 100, 128, 500)]
    for buckets, distance in settings:
        exact = buckets // (4 if bidirectional else 2)
        if distance <= exact:
            continue
        queries, keys = torch.arange(20), torch.arange(distance + 60)
        expected = hf.SwitchTransformersAttention._relative_position_bucket(
            keys[None] - queries[:, None], bidirectional, buckets, distance
        )
        table = bucket_table(buckets, distance, bidirectional)
        assert torch.equal(relative_bucket(table, queries, keys, bidirectional), expected)
        back = relative_bucket(table, keys, queries, bidirectional)
        expected = hf.SwitchTransformersAttention._relative_position_bucket(
            queries[None] - keys[:, None], bidirectional, buckets, distance
        )
        assert torch.equal(back, expected)


# --- Files ---


def test_there_and_back(tmp_path: Path) -> None:
    module = load(make(DROPPING), MODEL, DROPPING)
    torch.save(module.state_dict(), tmp_path / "model.pt")
    (tmp_path / "config.json").write_text(json.dumps(to_hf(DROPPING)))
    convert.convert(tmp_path / "model.pt", tmp_path / "flax")
    flax_twin = zoo.load(tmp_path / "flax", framework="flax")
    experts = flax_twin.encoder.block[0].layer[1].mlp.experts
    one = module.encoder.block[0].layer[1].mlp.experts.expert_1.wi.weight
    assert experts.wi.shape == (4, 32, 48)
    assert (experts.wi[1] == one.detach().numpy().T).all()
    convert.convert(tmp_path / "flax", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    expected = {n: t.numpy() for n, t in module.state_dict().items() if n in back}
    assert set(canonical(MODEL, DROPPING)) <= set(back)
    assert all((back[n] == a).all() for n, a in expected.items())


def names(config: Config) -> dict[str, Any]:
    return MODEL.layout_of(config).shapes("torch")


@pytest.mark.parametrize(("layers", "sparse"), [(12, 6), (12, 3), (4, 4), (5, 2), (1, 1), (3, 5)])
def test_the_sparse_layers_are_found(layers: int, sparse: int) -> None:
    config = replace(TIED, num_layers=layers, num_sparse_encoder_layers=sparse)
    settings = transformers.SwitchTransformersConfig(**to_hf(config))
    with torch.device("meta"):
        module = transformers.SwitchTransformersForConditionalGeneration(settings)
    assert {n: tuple(t.shape) for n, t in module.state_dict().items()} == names(config)
    fields = MODEL.infer(names(config))
    assert fields is not None
    assert names(replace(TIED, **fields)) == names(config)


def test_whether_the_head_is_tied_is_told_where_it_can_be() -> None:
    untied = names(DROPPING)
    both = MODEL.infer(untied)
    assert both is not None
    assert "tie_word_embeddings" not in both, "a file with every name may be either"
    short = {n: s for n, s in untied.items() if "embed_tokens" not in n}
    fields = MODEL.infer(short)
    assert fields is not None
    assert fields["tie_word_embeddings"] is False
    fields = MODEL.infer({n: s for n, s in short.items() if n != "lm_head.weight"})
    assert fields is not None
    assert fields["tie_word_embeddings"] is True


def test_other_models_are_not_taken_for_it() -> None:
    dense = replace(TIED, num_sparse_encoder_layers=9, num_sparse_decoder_layers=9)
    assert MODEL.infer(names(dense)) is None, "a T5"
    assert MODEL.infer(names(TIED) | {"classifier.weight": (2, 32)}) is None
    assert MODEL.infer({n: s for n, s in names(TIED).items() if n[0] != "d"}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router_dtype": "bfloat16"}, "bfloat16"),
        ({"feed_forward_proj": "gated-gelu"}, "gated"),
        ({"eos_token_id": [1, 2]}, "eos_token_id"),
        ({"dense_act_fn": "mish"}, "mish"),
        ({"relative_attention_num_buckets": 2}, "buckets"),
    ],
)
def test_a_config_that_this_model_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf(to_hf(TIED) | change)


def test_an_empty_config_json_means_what_transformers_means() -> None:
    theirs = transformers.SwitchTransformersConfig()
    mine = from_hf({})
    for field, value in vars(mine).items():
        if field != "decoder_start_token_id":  # published files state it
            assert value == getattr(theirs, field), field


# --- Routing ---


def sparse(framework: str, capacity: int) -> Any:
    config = replace(TIED, expert_capacity=capacity, router_jitter_noise=0.5, dropout_rate=0.0)
    return build(MODEL, config, framework, canonical(MODEL, config)).encoder.block[1].layer[1].mlp


@FRAMEWORKS
def test_tokens_beyond_the_capacity_pass_through(framework: str) -> None:
    x = probe.normal("x", (2, 9, 32)).astype(np.float32)
    given = torch.from_numpy(x) if framework == "torch" else jnp.asarray(x)
    all_in, logits = sparse(framework, 9)(given)
    some, _ = sparse(framework, 2)(given)
    chosen = np.asarray(logits.tolist()).argmax(-1)
    all_in, some = np.asarray(all_in.tolist()), np.asarray(some.tolist())
    dropped = 0
    for b in range(2):
        for t in range(9):
            if (chosen[b, :t] == chosen[b, t]).sum() < 2:
                assert np.allclose(some[b, t], all_in[b, t], rtol=1e-5, atol=1e-6)
            else:
                assert (some[b, t] == 0).all()
                dropped += 1
    assert dropped > 3


@pytest.mark.parametrize("config", [pytest.param(c, id=n) for n, c in MODEL.tiny.items()])
def test_every_expert_is_visited(config: Config) -> None:
    """The faults that test_models plants leave out what is stacked: these are seen too."""
    weights, inputs = canonical(MODEL, config), MODEL.inputs(config)
    right = run(MODEL, config, "torch", weights, inputs, "float32")["output.logits"]
    experts = [n for n in weights if ".experts." in n]
    assert len(experts) == 2 * 2 * config.num_experts
    for name in experts:
        other = weights | {name: np.zeros_like(weights[name])}
        got = run(MODEL, config, "torch", other, inputs, "float32")["output.logits"]
        assert np.abs(got - right).max() > 0.01, name


@FRAMEWORKS
def test_jitter_acts_in_training_only(framework: str) -> None:
    x = probe.normal("x", (2, 9, 32)).astype(np.float32)
    given = torch.from_numpy(x) if framework == "torch" else jnp.asarray(x)
    mlp = sparse(framework, 9)
    assert mlp(given)[1].tolist() == mlp(given)[1].tolist()
    mlp.train()
    a, b = (np.asarray(mlp(given)[1].tolist()) for _ in range(2))
    assert (a != b).all()
    assert np.abs(a - b).max() < 5


@FRAMEWORKS
def test_the_router_never_computes_in_half_precision(framework: str) -> None:
    config = DROPPING
    model = build(MODEL, config, framework, canonical(MODEL, config), dtype="bfloat16")
    mlp = model.encoder.block[0].layer[1].mlp
    x = probe.normal("x", (2, 9, 32)).astype(np.float32)
    given = torch.from_numpy(x).bfloat16() if framework == "torch" else jnp.asarray(x, jnp.bfloat16)
    y, logits = mlp(given)
    assert str(y.dtype).endswith("bfloat16")
    assert str(logits.dtype).endswith("float32")


# --- Generation ---


@pytest.fixture(scope="module")
def greedy() -> np.ndarray:
    return GENERATOR.decode("torch")


def test_greedy_tokens_are_those_of_transformers(greedy: np.ndarray) -> None:
    inputs = MODEL.inputs(TIED)
    made = load(make(TIED), MODEL, TIED, GENERATOR.weights()).generate(
        torch.from_numpy(inputs["input_ids"]),
        attention_mask=torch.from_numpy(inputs["attention_mask"]),
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        do_sample=False,
        num_beams=1,
        eos_token_id=None,
    )
    assert (made[:, 0] == TIED.decoder_start_token_id).all()
    free = GENERATOR.decode("torch", replace(TIED, eos_token_id=-1))
    assert (made[:, 1:].numpy() == free).all()
    assert (free == greedy).all()


def test_one_token_at_a_time_always_finds_room() -> None:
    """Once capacity binds, a cached decode differs from an uncached one, upstream too."""
    config = replace(TIED, expert_capacity=2)
    assert (
        GENERATOR.decode("torch", config) != GENERATOR.decode("torch", config, use_cache=False)
    ).any()


# --- The transformations of either framework ---


def test_jit_grad_and_vmap() -> None:
    config = replace(DROPPING, expert_capacity=9)
    inputs = MODEL.inputs(config)
    graph, params, rest = nnx.split(
        build(MODEL, config, "flax", canonical(MODEL, config)), nnx.Param, ...
    )

    @jax.jit
    @jax.value_and_grad
    def loss(params: Any) -> Any:
        def one(inputs: Any) -> Any:
            batch = {k: v[None] for k, v in inputs.items()}
            output = nnx.merge(graph, params, rest)(**batch)
            return output.logits[0], output.encoder_z_loss

        logits, z_loss = jax.vmap(one)(inputs)
        return jnp.square(logits).sum() + z_loss.mean()

    value, gradients = loss(params)
    exact = run(MODEL, config, "torch", canonical(MODEL, config), inputs, "float64")
    expected = np.square(exact["output.logits"]).sum() + exact["output.encoder_z_loss"]
    assert abs(value - expected) <= 1e-5 * expected
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(gradients))


def test_export() -> None:
    model = build(MODEL, DROPPING, "torch", canonical(MODEL, DROPPING))
    inputs = {k: torch.from_numpy(v) for k, v in MODEL.inputs(DROPPING).items()}
    exported = torch.export.export(model, (), inputs)
    got, expected = named_outputs(exported.module()(**inputs)), named_outputs(model(**inputs))
    assert all(torch.equal(got[n], x) for n, x in expected.items())


@FRAMEWORKS
def test_without_decoder_ids_there_is_the_start_alone(framework: str) -> None:
    weights, inputs = canonical(MODEL, DROPPING), MODEL.inputs(DROPPING)
    ids = {"input_ids": inputs["input_ids"]}
    got = run(MODEL, DROPPING, framework, weights, ids, "float32")["output.logits"]
    start = ids | {"decoder_input_ids": np.zeros((2, 1), np.int64)}
    expected = run(MODEL, DROPPING, "torch", weights, start, "float32")["output.logits"]
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
