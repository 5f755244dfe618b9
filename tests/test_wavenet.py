"""WaveNet against a second writing of it, its causality, and samples made one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import Arrays, canonical
from torch import nn

import convert
import zoo
from convert.compare.outputs import run
from convert.judge.noise import EXACT, MARGIN
from convert.judge.rows import FLOOR
from zoo import probe
from zoo.containers.errors import UsageError
from zoo.loading import build
from zoo.models.wavenet import MODEL, mu_law
from zoo.models.wavenet.config import Config

FRAMEWORKS = pytest.mark.parametrize("framework", ["torch", "flax"])
CONFIGS = pytest.mark.parametrize("config", [pytest.param(c, id=n) for n, c in MODEL.tiny.items()])


class Plain(nn.Module):
    """The paper's equations, with nothing of the zoo in them."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        R, D, S, k = c.residual_channels, c.gate_channels, c.skip_channels, c.kernel_size
        self.input = nn.Conv1d(c.classes, R, k, padding=k - 1)
        self.layers = nn.ModuleList()
        for i in range(c.layers):
            d = 2 ** (i % c.dilation_cycle)
            layer = nn.Module()
            layer.filter = nn.Conv1d(R, D, k, dilation=d, padding=(k - 1) * d)
            layer.gate = nn.Conv1d(R, D, k, dilation=d, padding=(k - 1) * d)
            if c.global_channels:
                layer.filter_global = nn.Linear(c.global_channels, D, bias=False)
                layer.gate_global = nn.Linear(c.global_channels, D, bias=False)
            if c.local_channels:
                layer.filter_local = nn.Conv1d(c.local_channels, D, 1, bias=False)
                layer.gate_local = nn.Conv1d(c.local_channels, D, 1, bias=False)
            layer.skip = nn.Conv1d(D, S, 1)
            if i + 1 < c.layers:
                layer.residual = nn.Conv1d(D, R, 1)
            self.layers.append(layer)
        self.output1 = nn.Conv1d(S, S, 1)
        self.output2 = nn.Conv1d(S, c.classes, 1)

    def forward(
        self, samples: Any, global_condition: Any = None, local_condition: Any = None
    ) -> Any:
        T = samples.shape[1]
        eye = torch.eye(self.c.classes, dtype=self.input.weight.dtype)
        x = self.input(eye[samples].transpose(1, 2))[:, :, :T]
        total = 0.0
        for layer in self.layers:
            f, g = layer.filter(x)[:, :, :T], layer.gate(x)[:, :, :T]
            if global_condition is not None:
                f = f + layer.filter_global(global_condition).unsqueeze(-1)
                g = g + layer.gate_global(global_condition).unsqueeze(-1)
            if local_condition is not None:
                f = f + layer.filter_local(local_condition.transpose(1, 2))
                g = g + layer.gate_local(local_condition.transpose(1, 2))
            z = f.tanh() * g.sigmoid()
            total = total + layer.skip(z)
            if hasattr(layer, "residual"):
                x = x + layer.residual(z)
        return self.output2(F.relu(self.output1(F.relu(total)))).transpose(1, 2)


def plain(config: Config) -> Plain:
    """The class above with name-seeded weights, in float32."""
    module = Plain(config)
    shapes = {n: tuple(t.shape) for n, t in module.state_dict().items()}
    module.load_state_dict({n: torch.from_numpy(a) for n, a in probe.weights(shapes).items()})
    return module


def tensors(given: Arrays, precision: str) -> dict[str, torch.Tensor]:
    return {
        n: torch.from_numpy(a.astype(precision) if a.dtype.kind == "f" else a)
        for n, a in given.items()
    }


def numpy(x: Any) -> np.ndarray:
    return np.asarray(x.detach().numpy() if isinstance(x, torch.Tensor) else x)


def call(model: Any, framework: str, given: Arrays) -> np.ndarray:
    if framework == "torch":
        return numpy(model(**tensors(given, "float32")))
    return np.asarray(model(**{n: jax.numpy.asarray(a) for n, a in given.items()}))


@FRAMEWORKS
@CONFIGS
def test_the_papers_equations(config: Config, framework: str) -> None:
    given = MODEL.inputs(config)
    with torch.no_grad():
        rough = plain(config)(**tensors(given, "float32")).numpy()
        exact = plain(config).double()(**tensors(given, "float64")).numpy()
    with jax.enable_x64(True):
        for precision in ("float32", "float64"):
            got = run(MODEL, config, framework, canonical(MODEL, config), given, precision)
            scale = np.abs(exact).max()
            if precision == "float64":
                assert np.abs(got["output"] - exact).max() <= EXACT * scale
            else:
                noise = max(np.abs(rough - exact).max(), FLOOR * scale)
                assert np.abs(got["output"] - rough).max() <= MARGIN * noise


def test_a_plain_checkpoint_converts_and_loads(tmp_path: Path) -> None:
    config = MODEL.presets["wavenet_small"]
    module = plain(config)
    torch.save(module.state_dict(), tmp_path / "model.pt")
    made = convert.convert(tmp_path / "model.pt")
    loaded = zoo.load(tmp_path / made.target, framework="flax")
    given = {"samples": probe.integers("samples", (1, 40), config.classes)}
    with torch.no_grad():
        rough = module(**tensors(given, "float32")).numpy()
        exact = module.double()(**tensors(given, "float64")).numpy()
    noise = max(np.abs(rough - exact).max(), FLOOR * np.abs(exact).max())
    assert np.abs(call(loaded, "flax", given) - rough).max() <= MARGIN * noise


def test_other_sizes_need_the_dilations(tmp_path: Path) -> None:
    config = MODEL.tiny["plain"]
    torch.save(plain(config).state_dict(), tmp_path / "model.pt")
    with pytest.raises(UsageError, match="dilation_cycle"):
        zoo.load(tmp_path / "model.pt", framework="torch")
    with pytest.warns(zoo.LoadNotice, match="dilation_cycle"):
        loaded = zoo.load(tmp_path / "model.pt", framework="torch", dilation_cycle=2)
    assert loaded.config == config


def test_presets_start_alike() -> None:
    a = zoo.create("wavenet_small", framework="torch")
    b = zoo.create("wavenet_small", framework="flax")
    kernel = np.asarray(b.layers[3].gate.kernel[...])
    assert (kernel.transpose(2, 1, 0) == numpy(a.layers[3].gate.weight)).all()
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
    module = plain(config).double()
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
