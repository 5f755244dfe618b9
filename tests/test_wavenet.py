"""WaveNet: its causality, and samples made one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from support import Arrays, canonical
from upstream import load, tensors
from upstream.wavenet import Plain

import zoo
from zoo import probe
from zoo.containers.errors import UsageError
from zoo.loading import build
from zoo.models.wavenet import MODEL, mu_law
from zoo.models.wavenet.config import Config

FRAMEWORKS = pytest.mark.parametrize("framework", ["torch", "flax"])
CONFIGS = pytest.mark.parametrize("config", [pytest.param(c, id=n) for n, c in MODEL.tiny.items()])


def numpy(x: Any) -> np.ndarray:
    return np.asarray(x.detach().numpy() if isinstance(x, torch.Tensor) else x)


def call(model: Any, framework: str, given: Arrays) -> np.ndarray:
    if framework == "torch":
        return numpy(model(**tensors(given, "float32")))
    return np.asarray(model(**{n: jax.numpy.asarray(a) for n, a in given.items()}))


def test_other_sizes_need_the_dilations(tmp_path: Path) -> None:
    config = MODEL.tiny["plain"]
    torch.save(load(Plain(config), MODEL, config).state_dict(), tmp_path / "model.pt")
    with pytest.raises(UsageError, match="dilation_cycle"):
        zoo.load(tmp_path / "model.pt", framework="torch")
    with pytest.warns(zoo.LoadNotice, match="dilation_cycle"):
        loaded = zoo.load(tmp_path / "model.pt", framework="torch", dilation_cycle=2)
    assert loaded.config == config


def test_the_papers_dilations() -> None:
    big = MODEL.presets["wavenet"]
    assert big.dilations == tuple(2**i for i in range(10)) * 3
    assert big.receptive_field == 3071


@FRAMEWORKS
@CONFIGS
def test_no_output_depends_on_what_comes_later(config: Config, framework: str) -> None:
    reach = config.receptive_field
    T, at = reach + 12, 6
    given = {"samples": probe.integers("samples", (1, T), config.classes)}
    for name, C in (
        ("global_condition", config.global_channels),
        ("local_condition", config.local_channels),
    ):
        if C:
            shape = (1, C) if name == "global_condition" else (1, T, C)
            given[name] = probe.normal(name, shape).astype(np.float32)
    model = build(MODEL, config, framework, canonical(MODEL, config))
    before = call(model, framework, given)
    samples = given["samples"].copy()
    samples[0, at] = (samples[0, at] + 1) % config.classes
    gap = np.abs(call(model, framework, given | {"samples": samples}) - before)[0].max(-1)
    noise = 1e-5 * np.abs(before).max()
    assert (gap[:at] <= noise).all()
    assert gap[at] > 100 * noise, "the present sample is not seen"
    assert gap[at + reach - 1] > 2 * noise, "it does not reach as far as it says"
    assert (gap[at + reach :] <= noise).all()
    if config.local_channels:
        local = given["local_condition"].copy()
        local[0, at] += 1
        gap = np.abs(call(model, framework, given | {"local_condition": local}) - before)[0].max(-1)
        assert (gap[:at] <= noise).all()
        assert gap[at] > 100 * noise


STEPS, PROMPT = 64, 3


def conditions(config: Config, batch: int, steps: int) -> Arrays:
    given: Arrays = {}
    if config.global_channels:
        given["global_condition"] = probe.normal("g", (batch, config.global_channels))
    if config.local_channels:
        given["local_condition"] = probe.normal("l", (batch, steps, config.local_channels))
    return {n: a.astype(np.float32) for n, a in given.items()}


def uncached(config: Config, prompt: np.ndarray, given: Arrays, u: np.ndarray | None) -> Any:
    """All of the past anew for every sample, by the plain class; inverse of the distribution."""
    module = load(Plain(config), MODEL, config).double()
    samples = torch.from_numpy(prompt)
    local = given.get("local_condition")
    for i in range(STEPS):
        now = dict(given)
        if local is not None:
            now["local_condition"] = local[:, : samples.shape[1]]
        with torch.no_grad():
            logits = module(samples, **tensors(now, "float64"))[:, -1].numpy()
        if u is None:
            new = logits.argmax(-1)
        else:
            p = np.exp(logits / 0.8)
            edges = np.cumsum(p / p.sum(-1, keepdims=True), -1)
            new = np.array(
                [np.searchsorted(e, x, "right") for e, x in zip(edges, u[:, i], strict=True)]
            )
        samples = torch.cat([samples, torch.from_numpy(new)[:, None]], 1)
    return samples[:, prompt.shape[1] :].numpy()


@CONFIGS
@pytest.mark.parametrize("how", ["greedy", "sampled"])
def test_both_frameworks_generate_what_the_uncached_model_does(config: Config, how: str) -> None:
    B = 2
    prompt = probe.integers("prompt", (B, PROMPT), config.classes)
    given = conditions(config, B, PROMPT + STEPS - 1)
    u = np.random.RandomState(0).uniform(size=(B, STEPS)) if how == "sampled" else None
    expected = uncached(config, prompt, given, u)
    assert expected.shape == (B, STEPS)
    weights = canonical(MODEL, config)
    a = build(MODEL, config, "torch", weights)
    b = build(MODEL, config, "flax", weights)
    options: dict[str, Any] = {"steps": STEPS, "temperature": 0.8}
    torch_u = None if u is None else torch.from_numpy(u)
    got = a.generate(
        torch.from_numpy(prompt), uniforms=torch_u, **options, **tensors(given, "float32")
    )
    assert (got.numpy() == expected).all()
    given = {n: jax.numpy.asarray(x) for n, x in given.items()}
    flax_u = None if u is None else jax.numpy.asarray(u, np.float32)
    got = b.generate(jax.numpy.asarray(prompt, np.int32), uniforms=flax_u, **options, **given)
    assert (np.asarray(got) == expected).all()
    if how == "sampled":
        assert len(np.unique(expected)) > config.classes // 2, "hardly anything was drawn"


@FRAMEWORKS
def test_computation_in_bfloat16(framework: str) -> None:
    config = MODEL.tiny["plain"]
    given = MODEL.inputs(config)
    exact = call(build(MODEL, config, framework, canonical(MODEL, config)), framework, given)
    model = build(MODEL, config, framework, canonical(MODEL, config), dtype="bfloat16")
    if framework == "torch":
        out = model(**tensors(given, "float32"))
        assert out.dtype == torch.bfloat16
        got = out.detach().float().numpy()
        assert model.generate(torch.from_numpy(given["samples"]), 3).shape == (2, 3)
    else:
        out = model(**given)
        assert out.dtype == jax.numpy.bfloat16
        got = np.asarray(out, np.float32)
        assert model.generate(given["samples"], 3).shape == (2, 3)
    gap = np.abs(got - exact).max() / np.abs(exact).max()
    assert 2.0**-12 < gap < 2.0**-4


@FRAMEWORKS
def test_conditions_are_those_of_the_config(framework: str) -> None:
    config = MODEL.tiny["conditioned"]
    given = MODEL.inputs(config)
    model = build(MODEL, config, framework, canonical(MODEL, config))
    with pytest.raises(ValueError, match="local_condition is needed"):
        call(model, framework, {n: a for n, a in given.items() if n != "local_condition"})
    with pytest.raises(ValueError, match="nothing to make"):
        build(
            MODEL, MODEL.tiny["plain"], framework, canonical(MODEL, MODEL.tiny["plain"])
        ).generate(given["samples"], 0)
    config = replace(config, global_channels=0)
    model = build(MODEL, config, framework, canonical(MODEL, config))
    with pytest.raises(ValueError, match="global_condition is not needed"):
        call(model, framework, given)


@pytest.mark.parametrize("change", [{"kernel_size": 1}, {"layers": 0}, {"dilation_cycle": 0}])
def test_impossible_configs(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"at least|sees no past"):
        Config(**change)


def test_mu_law() -> None:
    classes = np.arange(256)
    wave = mu_law.decode(classes)
    assert abs(wave[0] + 1) < 1e-12
    assert abs(wave[255] - 1) < 1e-12
    assert (np.diff(wave) > 0).all()
    assert (mu_law.encode(wave) == classes).all()
    assert mu_law.encode(np.array([-2.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]
    # ln(1 + 255 * 0.5) / ln(256) is 0.8757 of the way from the middle to the end.
    assert mu_law.encode(np.array([0.5, -0.5])).tolist() == [239, 16]
    x = np.linspace(-1, 1, 1001)
    error = np.abs(mu_law.decode(mu_law.encode(x)) - x)
    assert (error <= np.log(256) / 255 * 1.02 * (np.abs(x) + 1 / 255)).all()
