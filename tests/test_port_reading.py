"""`convert.port`: lines that a person would have written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from port_reading import Shared, Stem, Tower

import convert
from convert.live.port_files import Port


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def stem() -> Port:
    torch.manual_seed(0)
    return convert.port(Stem, drawn(2, 3, 8, 8), level="outputs")


@pytest.fixture(scope="module")
def tower() -> Port:
    torch.manual_seed(0)
    return convert.port(Tower, drawn(2, 5, 8), level="outputs")


def test_a_class_derived_from_batch_norm_is_derived_from_flaxs(stem: Port) -> None:
    assert stem.proved.verdict == "same"
    assert "class NormAct(BatchNorm):" in stem.source
    assert "super().__init__(channels, eps=1e-5, momentum=0.1, rngs=rngs)" in stem.source
    assert "x = super().__call__(x)" in stem.source
    assert "train mode" not in stem.source


def test_and_its_statistics_are_torchs_in_training(stem: Port) -> None:
    torch.manual_seed(0)
    net, module, x = stem.net(), Stem(), drawn(4, 3, 8, 8)
    net.train()
    made = net(x.transpose(0, 2, 3, 1))
    with torch.no_grad():
        wanted = module.train()(torch.from_numpy(x))
    np.testing.assert_allclose(made, wanted.numpy(), atol=1e-5)
    for ours, theirs in ((net.norm1, module.norm1), (net.norm2, module.norm2)):
        np.testing.assert_allclose(ours.mean[...], theirs.running_mean.numpy(), atol=1e-6)
        np.testing.assert_allclose(ours.var[...], theirs.running_var.numpy(), atol=1e-6)


def test_what_is_flattened_stays_open(stem: Port) -> None:
    assert ".reshape(x.shape[0], -1)" in stem.source


def test_casts_that_do_nothing_in_float32_stay(tower: Port) -> None:
    lines = [line.strip() for line in tower.source.splitlines()]
    at = lines.index("input_dtype = hidden_states.dtype")
    assert lines[at + 1] == "hidden_states = hidden_states.astype(jnp.float32)"
    assert "return self.weight[...] * hidden_states.astype(input_dtype)" in lines
    assert not any("unused" in line for line in lines)


def test_tuples_are_handed_on_and_opened_as_in_the_source(tower: Port) -> None:
    assert tower.proved.verdict == "same"
    assert "cos, sin = self.rotation(x.shape[1])" in tower.source
    assert "cos, sin = positions" in tower.source
    assert "-> tuple[Array, Array]:" in tower.source


def test_a_loop_that_hands_on_a_part_is_a_loop(tower: Port) -> None:
    assert "for layer in self.layers:" in tower.source
    assert "hidden = layer(hidden, (cos, sin))" in tower.source


def test_a_part_of_the_model_is_given_to_a_constructor() -> None:
    torch.manual_seed(0)
    made = convert.port(Shared, drawn(2, 8), level="outputs")
    assert made.proved.verdict == "same"
    assert "def __init__(self, *, shift: Any, rngs: nnx.Rngs) -> None:" in made.source
    assert "Given(shift=self.bias, rngs=rngs)" in made.source
