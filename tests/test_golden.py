"""The twins against outputs that upstream's own code gave: data/golden, a case to each JSON file
(its fields: data/golden/README.md). A new one adds two files there, and no test."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from conftest import DATA
from documents import same
from safetensors import safe_open
from safetensors.numpy import load_file
from support import SLOW_FLAX, canonical

from convert.compare.outputs import run
from convert.judge.noise import EXACT, MARGIN
from convert.judge.rows import FLOOR
from zoo import probe
from zoo.model import Config, Model
from zoo.registry import families, get

GOLDEN = DATA / "golden"
CASES = {p.stem: json.loads(p.read_text()) for p in sorted(GOLDEN.glob("*.json"))}
# Of layers and of a part of a model: test_recurrent.py and test_transformer.py hold these.
PARTS = {"gru", "lstm", "rnn", "transformer"}


def subject(case: dict[str, Any]) -> tuple[Model, Config]:
    if "preset" in case:
        found = get(case["preset"])
        return found.model, found.config
    model = families()[case["model"]]
    return model, model.configure(**case["config"])


def test_every_golden_file_is_looked_at() -> None:
    assert {p.stem for p in GOLDEN.glob("*.safetensors")} == CASES.keys() | PARTS


@pytest.mark.parametrize("name", CASES)
def test_names_and_shapes_are_upstreams(name: str) -> None:
    model, config = subject(CASES[name])
    with safe_open(GOLDEN / f"{name}.safetensors", "np") as f:
        published = json.loads(f.metadata()["state_dict"])
    mine = model.layout_of(config).shapes("torch")
    assert mine == {n: tuple(s) for n, s in published.items()}
    fields = model.infer(mine)
    assert fields is not None
    assert model.layout_of(model.configure(**(vars(config) | fields))) == model.layout_of(config)


@pytest.mark.parametrize("framework", ["torch", SLOW_FLAX])
@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, framework: str) -> None:
    case = CASES[name]
    model, config = subject(case)
    golden = load_file(GOLDEN / f"{name}.safetensors")
    weights = canonical(model, config)
    for tensor, other in case.get("weights", {}).items():
        weights[tensor] = probe.weight(other, weights[tensor].shape)
    named = case.get("inputs", {})
    inputs = {n.removeprefix("in."): a for n, a in golden.items() if n.startswith("in.")}
    inputs = {named.get(n, n): a for n, a in inputs.items()}
    exact = run(model, config, framework, weights, inputs, "float64")
    rough = run(model, config, framework, weights, inputs, "float32")
    assert {n.partition(".")[0] for n in golden} - {"in"} == case["outputs"].keys()
    bound = EXACT if case.get("exact", True) else MARGIN * FLOOR
    for stored, output in case["outputs"].items():
        expected = golden[f"{stored}.f64"]
        assert np.abs(exact[output] - expected).max() <= bound * np.abs(expected).max()
        same(rough[output], golden[f"{stored}.f32"], expected)
