"""The twins against upstream's own classes, and what upstream publishes of them. The classes are
in upstream/, a module a family; nothing here names one."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from documents import every_output, same
from support import SLOW_FLAX, canonical
from upstream import Upstream, load, upstreams

import zoo
from convert.compare.outputs import run
from convert.judge.noise import EXACT, MARGIN
from convert.judge.rows import FLOOR
from zoo.model import Config, Model
from zoo.registry import families, get

FRAMEWORKS = pytest.mark.parametrize("framework", ["torch", SLOW_FLAX])

# Parameters, as published or counted by hand.
PARAMETERS = {
    "alexnet": 61_100_840,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    # Mnih 2015, table 1 of its methods, for 6 actions.
    "dqn_nature": (4 * 64 + 1) * 32
    + (32 * 16 + 1) * 64
    + (64 * 9 + 1) * 64
    + (3136 + 1) * 512
    + (512 + 1) * 6,
    "dqn_cartpole": (4 + 1) * 64 + (64 + 1) * 64 + (64 + 1) * 2,
    "sac": (3 + 1) * 256
    + (256 + 1) * 256
    + 2 * (256 + 1)  # the actor
    + 2 * ((4 + 1) * 256 + (256 + 1) * 256 + (256 + 1)),  # and its critics
}
# In millions, where that is what the paper says, and how far from it (%).
ABOUT = {"transformer_base": (65, 4), "transformer_big": (213, 4), "switch_base_8": (619, 0.08)}


@pytest.mark.parametrize("preset", PARAMETERS)
def test_parameters_as_published(preset: str) -> None:
    found = get(preset)
    assert found.model.layout_of(found.config).parameters == PARAMETERS[preset]


@pytest.mark.parametrize("preset", ABOUT)
def test_parameters_as_in_the_paper(preset: str) -> None:
    found = get(preset)
    millions, percent = ABOUT[preset]
    counted = found.model.layout_of(found.config).parameters / 1e6
    assert abs(counted - millions) < percent / 100 * millions


def every_upstream(*, transformers: bool = False) -> Any:
    """Parametrizes a test over (model, upstream, config) for all tiny configurations of families
    with a class of upstream; `transformers`: where it is one of transformers."""
    return pytest.mark.parametrize(
        ("model", "upstream", "config"),
        [
            pytest.param(families()[family], upstream, config, id=f"{family}-{name}")
            for family, upstream in upstreams().items()
            if upstream.make is not None and (families()[family].to_hf or not transformers)
            for name, config in families()[family].tiny.items()
        ],
    )


@pytest.mark.parametrize(
    ("model", "upstream", "config"),
    [
        pytest.param(
            families()[family],
            upstream,
            config,
            id=f"{family}-{name}",
            marks=[pytest.mark.slow] if name in families()[family].presets else [],
        )
        for family, upstream in upstreams().items()
        if upstream.make is not None
        for name, config in {**families()[family].presets, **families()[family].tiny}.items()
    ],
)
def test_names_and_shapes_are_upstreams(model: Model, upstream: Upstream, config: Config) -> None:
    assert upstream.make is not None
    with torch.device("meta"):
        module = upstream.make(config)
    layout = model.layout_of(config)
    found = {n: tuple(t.shape) for n, t in module.state_dict().items()}
    assert found == layout.shapes("torch")
    # Upstream may hold as a parameter what nothing depends on, and what is a constant here.
    ties = {e.torch[0].name for e in layout.entries if e.tied_to or e.constant}
    held = {n: p for n, p in module.named_parameters(remove_duplicate=False) if n not in ties}
    assert sum(p.numel() for p in held.values()) == layout.parameters


@FRAMEWORKS
@every_upstream()
def test_twins_compute_what_upstream_computes(
    model: Model, upstream: Upstream, config: Config, framework: str
) -> None:
    assert upstream.make is not None
    module = load(upstream.make(config), model, config)
    given, weights = model.inputs(config), canonical(model, config)
    with upstream.exactly():
        rough, exact = every_output(module, given, upstream.call)
    for precision in upstream.precisions:
        found = run(model, config, framework, weights, given, precision)
        got = {n: x for n, x in found.items() if n.partition(".")[0] == "output"}
        forgotten = {n for n in got if any(fnmatch.fnmatch(n, p) for p in upstream.forgets(config))}
        assert got.keys() - forgotten == exact.keys()
        for name, x in exact.items():
            if precision == "float32":
                same(got[name], rough[name], x)
                continue
            coarse = any(fnmatch.fnmatch(name, p) for p in upstream.rough)
            bound = MARGIN * FLOOR if coarse else EXACT
            assert np.abs(got[name] - x).max() <= bound * np.abs(x).max(), name


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@every_upstream(transformers=True)
def test_what_transformers_saves_is_loaded(
    model: Model, upstream: Upstream, config: Config, safe: bool, tmp_path: Path
) -> None:
    assert upstream.make is not None
    module = load(upstream.make(config), model, config)
    if safe:
        module.save_pretrained(tmp_path)
    else:
        module.config.save_pretrained(tmp_path)
        torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    mine = zoo.load(tmp_path, framework="torch")
    expected = module.state_dict()
    assert getattr(mine, "config", config) == config
    assert list(mine.state_dict()) == list(expected)
    assert all(torch.equal(t, expected[n]) for n, t in mine.state_dict().items())
    # What is tied is one, and nothing else is.
    held = dict(mine.named_parameters(remove_duplicate=False))
    ties = {e.torch[0].name: e.tied_to for e in model.layout_of(config).entries if e.tied_to}
    for name, source in ties.items():
        assert held[name] is held[source]
    assert len({id(p) for p in held.values()}) == len(held.keys() - ties.keys())


def test_every_module_of_upstream_is_of_a_family() -> None:
    assert upstreams().keys() <= families().keys()
