"""Translatotron: frames made one step at a time, and what it draws in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from support import Arrays, canonical
from upstream import load, tensors
from upstream.translatotron import Plain

import zoo
from convert.compare.outputs import run
from convert.judge.noise import EXACT, MARGIN
from convert.judge.rows import FLOOR
from convert.runtime.arrays import named_outputs
from zoo import probe
from zoo.containers.errors import UsageError
from zoo.loading import build
from zoo.models.translatotron import MODEL
from zoo.models.translatotron.config import Config
from zoo.models.translatotron.layout import infer

FRAMEWORKS = pytest.mark.parametrize("framework", ["torch", "flax"])
CONFIGS = pytest.mark.parametrize("config", [pytest.param(c, id=n) for n, c in MODEL.tiny.items()])
TINY = MODEL.tiny["auxiliary"]


def arrays(given: Arrays) -> dict[str, jax.Array]:
    return {n: jax.numpy.asarray(a) for n, a in given.items()}


def caller(model: Any, framework: str) -> Callable[[Arrays], Arrays]:
    """The model's outputs by name; in Flax compiled once for one set of shapes."""
    if framework == "torch":

        def run_torch(given: Arrays) -> Arrays:
            with torch.no_grad():
                outputs = named_outputs(model(**tensors(given)))
            return {n: x.float().numpy() for n, x in outputs.items()}

        return run_torch
    graph, state = nnx.split(model)
    compiled = jax.jit(lambda given: nnx.merge(graph, state)(**given))
    return lambda given: {
        n: np.asarray(x, np.float32) for n, x in named_outputs(compiled(arrays(given))).items()
    }


@pytest.mark.parametrize("preset", list(MODEL.presets))
def test_sizes_of_a_preset_tell_all_of_it(preset: str) -> None:
    config = MODEL.presets[preset]
    fields = infer(MODEL.layout_of(config).shapes("torch"))
    assert fields is not None
    assert MODEL.configure(**fields) == config


def test_other_sizes_need_the_layers(tmp_path: Path) -> None:
    torch.save(load(Plain(TINY), MODEL, TINY).state_dict(), tmp_path / "model.pt")
    with pytest.raises(UsageError, match="source_layer, target_layer, zoneout"):
        zoo.load(tmp_path / "model.pt", framework="torch")
    with pytest.warns(zoo.LoadNotice, match="source_layer"):
        loaded = zoo.load(
            tmp_path / "model.pt", framework="torch", source_layer=1, target_layer=2, zoneout=0.1
        )
    assert loaded.config == TINY


STEPS = 6


def translate(config: Config, framework: str, weights: Arrays, precision: str, **more: Any) -> Any:
    """(frames, frames_before, lengths) of the sample inputs, as NumPy arrays."""
    model = build(MODEL, config, framework, weights, param_dtype=precision)
    given = {n: MODEL.inputs(config)[n] for n in ("source", "source_lengths")} | more
    if framework == "torch":
        return [x.numpy() for x in model.translate(steps=STEPS, **tensors(given, precision))]
    source = given["source"].astype(precision)
    made = model.translate(
        jax.numpy.asarray(source), STEPS, jax.numpy.asarray(given["source_lengths"])
    )
    return [np.asarray(x) for x in made]


def never_ending(config: Config) -> Arrays:
    """Name-seeded weights whose stop logits stay negative."""
    weights = canonical(MODEL, config)
    return weights | {"decoder.stop.bias": np.full((1,), -50, np.float32)}


@CONFIGS
def test_frame_by_frame_alike_in_both_frameworks(config: Config) -> None:
    weights = never_ending(config)
    with jax.enable_x64(True):
        made = {
            (f, p): translate(config, f, weights, p)
            for f in ("torch", "flax")
            for p in ("float32", "float64")
            if (f, p) != ("flax", "float32") or config == TINY  # compiling is what costs here
        }
    rough, exact = made["torch", "float32"], made["torch", "float64"]
    assert exact[0].shape == (2, STEPS * config.reduction, config.frame_size)
    for i in (0, 1):
        scale = np.abs(exact[i]).max()
        assert scale > 0.05
        assert np.abs(made["flax", "float64"][i] - exact[i]).max() <= EXACT * scale
        noise = max(np.abs(rough[i] - exact[i]).max(), FLOOR * scale)
        if config == TINY:
            assert np.abs(made["flax", "float32"][i] - rough[i]).max() <= MARGIN * noise
    for x in made.values():
        assert x[2].tolist() == [STEPS * config.reduction] * 2


@CONFIGS
def test_cached_steps_are_the_teacher_forced_ones(config: Config) -> None:
    """Its own frames as the target, to the second writing: the same frames come out."""
    weights = never_ending(config)
    module = load(Plain(config), MODEL, config).double()
    with torch.no_grad():
        module.decoder.stop.bias.fill_(-50)
    after, before, _ = translate(config, "torch", weights, "float64")
    given = MODEL.inputs(config) | {"target": before}
    with torch.no_grad():
        forced = module(**tensors(given, "float64"))
    for name, x in (("frames", after), ("frames_before", before)):
        want = forced[name].numpy()
        assert np.abs(x - want).max() <= EXACT * np.abs(want).max()
    assert np.abs(before[:, 1:] - before[:, :-1]).max() > 1e-3, "all frames are one"


@FRAMEWORKS
def test_an_utterance_ends_at_its_first_stop(framework: str) -> None:
    weights = never_ending(TINY)
    unbroken = translate(TINY, framework, weights, "float32")
    # The stop logit that lies between those of the two utterances, so that one ends early.
    model = build(MODEL, TINY, "torch", canonical(MODEL, TINY))
    given = MODEL.inputs(TINY) | {"target": unbroken[1]}
    logits = model(**tensors(given)).stop.detach().numpy()
    highest = logits.max(1)
    late, early = (int(i) for i in np.argsort(highest))
    bias = canonical(MODEL, TINY)["decoder.stop.bias"] - np.float32(highest.mean())
    expected = int(np.argmax(logits[early] > highest.mean())) + 1
    after, before, lengths = translate(
        TINY, framework, weights | {"decoder.stop.bias": bias}, "float32"
    )
    r = TINY.reduction
    assert lengths[late] == STEPS * r
    assert lengths[early] == expected * r
    for x in (after, before):
        assert (x[early, expected * r :] == 0).all()
        assert (np.abs(x[early, : expected * r]).max(-1) > 0).all()
    assert np.abs(before[early, : expected * r] - unbroken[1][early, : expected * r]).max() < 1e-6


@FRAMEWORKS
def test_translating_in_training_mode_is_refused(framework: str) -> None:
    model = build(MODEL, TINY, framework, canonical(MODEL, TINY))
    model.train()
    cast: Any = tensors if framework == "torch" else arrays
    source = cast(MODEL.inputs(TINY))["source"]
    with pytest.raises(ValueError, match=r"for evaluation: call eval\(\) first"):
        model.translate(source, 2)


@FRAMEWORKS
def test_padding_of_the_source_does_not_matter(framework: str) -> None:
    given = MODEL.inputs(TINY)
    other = given["source"].copy()
    other[1, given["source_lengths"][1] :] = 9.0
    call = caller(build(MODEL, TINY, framework, canonical(MODEL, TINY)), framework)
    lengths = given["source_lengths"] + np.array([0, 1])
    a, b, c = (
        call(x) for x in (given, given | {"source": other}, given | {"source_lengths": lengths})
    )
    for name in a:
        assert (a[name] == b[name]).all()
        assert (a[name][1] != c[name][1]).any()


def test_no_lengths_means_all_frames() -> None:
    given = MODEL.inputs(TINY)
    S = given["source"].shape[1]
    whole = given | {"source_lengths": np.full(2, S)}
    del given["source_lengths"]
    call = caller(build(MODEL, TINY, "torch", canonical(MODEL, TINY)), "torch")
    a, b = call(given), call(whole)
    assert all((a[n] == b[n]).all() for n in a)
    flax = build(MODEL, TINY, "flax", canonical(MODEL, TINY))
    mask = jax.jit(lambda source: flax.encode(source, None)[1])
    assert (np.asarray(mask(jax.numpy.asarray(given["source"]))) == np.ones((2, S))).all()


STILL = {
    "dropout_prob": 0.0,
    "prenet_dropout": 0.0,
    "attention_dropout": 0.0,
    "postnet_dropout": 0.0,
    "zoneout": 0.0,
}


def test_batch_statistics_move_alike() -> None:
    config = replace(TINY, **STILL)
    a = build(MODEL, config, "torch", canonical(MODEL, config)).postnet.train()
    b = build(MODEL, config, "flax", canonical(MODEL, config)).postnet
    b.train()
    frames = probe.normal("frames", (2, 9, config.frame_size)).astype(np.float32)
    x, y = a(torch.from_numpy(frames)), b(jax.numpy.asarray(frames))
    np.testing.assert_allclose(x.detach().numpy(), np.asarray(y), rtol=1e-5, atol=1e-5)
    for p, q in zip(a.norms, b.norms, strict=True):
        np.testing.assert_allclose(p.running_mean.numpy(), np.asarray(q.mean[...]), rtol=1e-5)
        np.testing.assert_allclose(p.running_var.numpy(), np.asarray(q.var[...]), rtol=1e-5)
        assert p.num_batches_tracked.item() == 1


@pytest.mark.parametrize("name", list(STILL))
def test_every_dropout_acts_in_training_only(name: str) -> None:
    """One at a time; the post-net is left out, whose BatchNorm acts in training as well."""
    config = replace(TINY, **STILL | {name: 0.5})
    given = MODEL.inputs(config)
    model = build(MODEL, config, "torch", canonical(MODEL, config))
    call = caller(model, "torch")
    field = "output.frames" if name == "postnet_dropout" else "output.frames_before"
    still = [call(given)[field] for _ in range(2)]
    model.train()
    moving = [call(given)[field] for _ in range(2)]
    assert (still[0] == still[1]).all()
    assert (moving[0] != moving[1]).any()


@FRAMEWORKS
def test_what_is_drawn_in_training(framework: str) -> None:
    config = replace(TINY, zoneout=0.25, attention_dropout=0.25, prenet_dropout=0.5)
    model = build(MODEL, config, framework, canonical(MODEL, config))
    rnn, prenet = model.decoder.rnn, model.decoder.prenet
    cast: Any = torch.from_numpy if framework == "torch" else jax.numpy.asarray
    encoded = np.zeros((2, 5, 2 * config.encoder_size), np.float32)
    memory = rnn.attention.memory(cast(encoded), cast(np.ones((2, 5), bool)))
    frames = cast(np.ones((50, config.frame_size), np.float32))
    assert np.unique(np.asarray(rnn.masks(3, memory).update.tolist())).tolist() == [0.75]
    assert np.unique(np.asarray(rnn.masks(3, memory).attention.tolist())).tolist() == [1.0]
    whole = np.asarray(prenet(frames).tolist())
    np.testing.assert_allclose(whole, whole[:1].repeat(50, 0), rtol=1e-5, atol=1e-6)
    model.train()
    masks = [np.asarray(m.tolist()) for m in rnn.masks(200, memory)]
    assert masks[0].shape == (200, config.decoder_layers, 2, 2, config.decoder_size)
    assert masks[1].shape == (200, 2, config.attention_heads, 5)
    assert np.unique(masks[0]).tolist() == [0.0, 1.0], "a state is kept, or the new one taken"
    np.testing.assert_allclose(np.unique(masks[1]), [0.0, 1 / 0.75])
    assert abs(masks[0].mean() - 0.75) < 0.05
    assert abs((masks[1] > 0).mean() - 0.75) < 0.05
    assert len(np.unique(np.asarray(prenet(frames).tolist()), axis=0)) > 10


@FRAMEWORKS
def test_computation_in_bfloat16(framework: str) -> None:
    given = MODEL.inputs(TINY)
    exact = run(MODEL, TINY, "torch", canonical(MODEL, TINY), given, "float32")["output.frames"]
    model = build(MODEL, TINY, framework, canonical(MODEL, TINY), dtype="bfloat16")
    if framework == "torch":
        assert model.translate(tensors(given)["source"], 2).frames.dtype == torch.bfloat16
    else:
        made = jax.eval_shape(lambda source: model.translate(source, 2), given["source"])
        assert made.frames.dtype == jax.numpy.bfloat16
    got = caller(model, framework)(given)["output.frames"]
    gap = np.abs(got - exact).max() / np.abs(exact).max()
    assert 2.0**-12 < gap < 2.0**-3


@FRAMEWORKS
def test_what_cannot_be_said_of_it(framework: str) -> None:
    cast: Any = tensors if framework == "torch" else arrays
    model = build(MODEL, TINY, framework, canonical(MODEL, TINY))
    given = MODEL.inputs(TINY)
    with pytest.raises(ValueError, match="5 target frames are no multiple of 2"):
        model(**cast(given | {"target": given["target"][:, :5]}))
    with pytest.raises(ValueError, match="steps is 0"):
        model.translate(cast(given)["source"], 0)
    without = {n: x for n, x in given.items() if "phonemes" not in n}
    if framework == "torch":
        output = model(**cast(without))
        assert output.source_logits is None
        assert output.target_logits is None
    config = MODEL.tiny["spectrogram_only"]
    model = build(MODEL, config, framework, canonical(MODEL, config))
    given = MODEL.inputs(config)
    with pytest.raises(ValueError, match="source_phonemes given, but"):
        model(**cast(given | {"source_phonemes": np.zeros((2, 3), np.int64)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_heads": 5}, "not divisible"),
        ({"postnet_kernel": 4}, "even"),
        ({"zoneout": 1.0}, "zoneout"),
        ({"source_layer": 9}, "source_layer"),
        ({"target_layer": 0}, "target_layer"),
    ],
)
def test_impossible_configs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**change)
