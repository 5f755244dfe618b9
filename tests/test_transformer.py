"""The Transformer against torch.nn.Transformer, golden outputs, and itself while it generates."""

from __future__ import annotations

import math
import warnings
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

import convert
import zoo
from convert.compare.outputs import run
from convert.judge.noise import EXACT, MARGIN
from convert.judge.rows import FLOOR
from zoo.loading import build
from zoo.models.transformer import MODEL
from zoo.models.transformer.config import Config
from zoo.nn import (
    attention_flax,
    attention_torch,
    generation_flax,
    generation_torch,
    positions_flax,
    positions_torch,
)

TIED, SEPARATE = MODEL.tiny["tied"], MODEL.tiny["two_vocabularies"]
FRAMEWORKS = pytest.mark.parametrize("framework", ["torch", "flax"])


class Seq2Seq(torch.nn.Transformer):
    """What the paper says, written with torch's own classes."""

    def __init__(self, c: Config) -> None:
        with warnings.catch_warnings(action="ignore"):  # norm_first: no nested tensors
            super().__init__(
                c.d_model,
                c.nhead,
                c.num_encoder_layers,
                c.num_decoder_layers,
                c.dim_feedforward,
                c.dropout,
                c.activation,
                layer_norm_eps=c.layer_norm_eps,
                batch_first=True,
                norm_first=c.norm_first,
            )
        self.src_embedding = torch.nn.Embedding(c.src_vocab_size, c.d_model)
        self.tgt_embedding = torch.nn.Embedding(c.tgt_vocab_size, c.d_model)
        self.generator = torch.nn.Linear(c.d_model, c.tgt_vocab_size)
        if c.tie_embeddings:
            self.tgt_embedding.weight = self.generator.weight = self.src_embedding.weight

    def embed(self, words: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        positions = np.zeros((ids.shape[1], self.d_model))
        for p in range(ids.shape[1]):
            for i in range(0, self.d_model, 2):
                positions[p, i] = math.sin(p / 10000 ** (i / self.d_model))
                positions[p, i + 1] = math.cos(p / 10000 ** (i / self.d_model))
        x = words(ids) * self.d_model**0.5
        return x + torch.from_numpy(positions).to(x.dtype)

    def forward(self, src: Any, tgt: Any, src_pad: Any = None, tgt_pad: Any = None) -> Any:
        T = tgt.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool).triu(1)
        x = super().forward(
            self.embed(self.src_embedding, src),
            self.embed(self.tgt_embedding, tgt),
            tgt_mask=causal,
            src_key_padding_mask=src_pad,
            tgt_key_padding_mask=tgt_pad,
            memory_key_padding_mask=src_pad,
        )
        return self.generator(x)


def document(c: Config, weights: Arrays) -> Seq2Seq:
    module = Seq2Seq(c).eval()
    given = {n: torch.from_numpy(a) for n, a in weights.items()}
    missing, surplus = module.load_state_dict(given, strict=False)
    assert set(missing) == {e.torch[0].name for e in MODEL.layout_of(c).entries if e.tied_to}
    assert not surplus
    return module


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


@pytest.mark.parametrize("config", [pytest.param(c, id=n) for n, c in MODEL.tiny.items()])
def test_the_twin_computes_what_torch_nn_computes(config: Config) -> None:
    """The Flax twin is held against this one in test_models."""
    weights = canonical(MODEL, config)
    inputs = MODEL.inputs(config)
    given = [torch.from_numpy(x) for x in inputs.values()]
    rough = document(config, weights)(*given).detach().numpy()
    exact = document(config, weights).double()(*given).detach().numpy()
    got = {
        p: run(MODEL, config, "torch", weights, inputs, p)["output"] for p in ("float64", "float32")
    }
    judge(got, exact, rough)


def test_the_state_dict_is_torch_nn_transformers() -> None:
    mine = build(MODEL, TIED, "torch", canonical(MODEL, TIED)).state_dict()
    own = {"src_embedding", "tgt_embedding", "generator"}
    inner = {n: t.shape for n, t in mine.items() if n.partition(".")[0] not in own}
    theirs = torch.nn.Transformer(32, 4, 2, 2, 48, batch_first=True).state_dict()
    assert inner == {n: t.shape for n, t in theirs.items()}
    assert list(inner) == list(theirs)


@pytest.mark.parametrize("tied", [True, False])
def test_a_documents_checkpoint_converts_with_its_name_alone(tied: bool, tmp_path: Path) -> None:
    """Of a preset's size, so that the heads are known too."""
    config = replace(MODEL.presets["transformer_small"], tie_embeddings=tied)
    module = document(config, canonical(MODEL, config))
    torch.save(module.state_dict(), tmp_path / "seq2seq.pt")
    inputs = MODEL.inputs(config)
    convert.convert(tmp_path / "seq2seq.pt")
    loaded = zoo.load(tmp_path / "seq2seq.flax", framework="flax")
    assert (loaded.generator.kernel[...] == module.generator.weight.detach().numpy().T).all()
    if not tied:
        return
    expected = module(*map(torch.from_numpy, inputs.values())).detach().numpy()
    got = np.asarray(nnx.jit(lambda m, x: m(**x))(loaded, inputs))
    exact = run(MODEL, config, "torch", canonical(MODEL, config), inputs, "float64")["output"]
    noise = np.abs(expected - exact).max()
    assert np.abs(got - expected).max() <= MARGIN * max(noise, FLOOR * np.abs(exact).max())


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
    ("preset", "paper"), [("transformer_base", 65e6), ("transformer_big", 213e6)]
)
def test_parameters_as_in_the_paper(preset: str, paper: float) -> None:
    counted = MODEL.layout_of(MODEL.presets[preset]).parameters
    assert abs(counted - paper) < 0.04 * paper


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


# --- Generation ---

STEPS = 64
LIVELY = replace(SEPARATE, num_encoder_layers=1)


def lively(config: Config) -> Arrays:
    """Weights with which the likeliest token changes from step to step."""
    weights = canonical(MODEL, config)
    return {n: a * 5 if n.endswith("linear2.weight") else a for n, a in weights.items()}


def decode(framework: str, config: Config = LIVELY, **options: Any) -> np.ndarray:
    """Tokens for the sample source, 1 being the start."""
    inputs = MODEL.inputs(config)
    model = build(MODEL, config, framework, lively(config))
    src, mask = inputs["src"], inputs["src_key_padding_mask"]
    if framework == "torch":
        options = {
            k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in options.items()
        }
        src, mask = torch.from_numpy(src), torch.from_numpy(mask)
        made = model.generate(src, STEPS, 1, src_key_padding_mask=mask, **options)
        return made.numpy()
    return np.asarray(model.generate(src, STEPS, 1, src_key_padding_mask=mask, **options))


def test_greedy_tokens_are_the_same_cached_or_not_in_both() -> None:
    made = [decode(f, use_cache=u) for f in ("torch", "flax") for u in (True, False)]
    assert made[0].shape == (2, STEPS)
    assert len(np.unique(made[0][0])) > 5, "too dull to show a mistake"
    assert (made[0][0] != made[0][1]).any()
    assert all((made[0] == other).all() for other in made[1:])


@FRAMEWORKS
def test_one_token_at_a_time_has_the_logits_of_all_at_once(framework: str) -> None:
    weights, inputs = canonical(MODEL, LIVELY), MODEL.inputs(LIVELY)
    names = ("src", "tgt", "src_key_padding_mask")
    given = {n: inputs[n] for n in names}
    whole = run(MODEL, LIVELY, "torch", weights, given, "float64")["output"]
    src, tgt, mask = (inputs[n] for n in names)
    T = tgt.shape[1]
    with jax.enable_x64(True), torch.no_grad():
        model = build(MODEL, LIVELY, framework, weights, param_dtype="float64")
        step, empty = model.decode, attention_flax.empty_cache
        if framework == "torch":
            src, tgt, mask = map(torch.from_numpy, (src, tgt, mask))
            empty = attention_torch.empty_cache
        else:
            graph, state = nnx.split(model)
            step = jax.jit(lambda *a: nnx.merge(graph, state).decode(*a))
        memory = model.remember(src, mask)
        past = [empty(kv, T) for kv in memory]
        logits = []
        for i in range(T):
            made, past = step(tgt[:, i : i + 1], memory, None, mask, past, i)
            logits.append(np.asarray(made))
    assert np.abs(np.concatenate(logits, 1) - whole).max() <= EXACT * np.abs(whole).max()


def test_sampled_tokens_are_the_same_for_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    uniforms = np.random.default_rng(0).random((2, STEPS), np.float32)
    options = {"uniforms": uniforms, "temperature": 0.7, "top_k": 9}
    traces = []

    def counted(*args: Any) -> Any:
        traces.append(args)
        return real(*args)

    real = generation_flax.generate_tokens
    monkeypatch.setattr(generation_flax, "generate_tokens", counted)
    a, b = (decode(f, **options) for f in ("torch", "flax"))
    assert (a == b).all()
    assert (a != decode("torch")).any()
    options |= {"uniforms": uniforms[::-1].copy(), "temperature": 0.9}
    c, d = (decode(f, **options) for f in ("torch", "flax"))
    assert (c == d).all()
    assert (c != a).any()
    assert len(traces) == 1, "compiled anew for other numbers"


def test_after_the_end_there_is_padding() -> None:
    config = replace(SMALL, tie_embeddings=True)
    plain = decode("torch", config)
    eos = int(plain[0, 9])
    made = [decode(f, config, eos_token=eos, pad_token=3) for f in ("torch", "flax")]
    assert (made[0] == made[1]).all()
    for row, free in zip(made[0], plain, strict=True):
        ends = np.nonzero(free == eos)[0]
        end = ends[0] + 1 if len(ends) else STEPS
        assert (row[:end] == free[:end]).all()
        assert (row[end:] == 3).all()


@FRAMEWORKS
def test_draws_follow_the_probabilities(framework: str) -> None:
    logits = np.log(np.array([[0.1, 0.2, 0.3, 0.4]], np.float32)).repeat(5, 0)
    uniform = np.array([0.0, 0.09, 0.29, 0.59, 0.999], np.float32)
    if framework == "torch":
        choose: Any = generation_torch.choose_token
        x, u = torch.from_numpy(logits), torch.from_numpy(uniform)
    else:
        choose, x, u = generation_flax.choose_token, jnp.asarray(logits), jnp.asarray(uniform)
    assert choose(x).tolist() == [3] * 5
    assert choose(x, u).tolist() == [0, 0, 1, 2, 3]
    assert choose(x, u, top_k=2).tolist() == [2, 2, 2, 3, 3]
    assert choose(x, u, temperature=0.02).tolist() == [0, 3, 3, 3, 3]


@FRAMEWORKS
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"uniforms": np.zeros((2, 3))}, "uniforms are"),
    ],
)
def test_impossible_requests(framework: str, options: dict[str, Any], message: str) -> None:
    model = build(MODEL, SMALL, framework, canonical(MODEL, SMALL))
    with pytest.raises(ValueError, match=message):
        model.generate(np.zeros((2, 5)), **{"max_new_tokens": 4, "start_token": 1} | options)


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
