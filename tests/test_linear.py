"""Linear maps, and a layer of one's own with parameters."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from documents import filled, outputs, same
from torch import nn

import convert
import zoo
from zoo import probe
from zoo.containers.errors import ZooError


class MyScale(nn.Module):
    """A user's own, with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def test_a_layer_with_parameters_is_told_by_its_names(tmp_path: Path) -> None:
    module = filled(nn.Sequential(MyScale(), nn.Linear(10, 10), nn.ReLU()))
    torch.save(module.state_dict(), tmp_path / "a.pt")
    made = convert.convert(tmp_path / "a.pt")
    assert made.config == {"layer": "scale", "in_features": 10, "out_features": 10}
    x = probe.normal("x", (4, 10))
    got = zoo.load(tmp_path / "a.flax", framework="flax")(jnp.asarray(x, jnp.float32))
    same(got, *outputs(module, x))
    without, _ = outputs(nn.Sequential(*list(module.children())[1:]), x)
    assert np.abs(np.asarray(got) - without).max() > 0.01, "the factors do nothing"


@pytest.mark.parametrize("framework", ["torch", "flax"])
@pytest.mark.parametrize("preset", ["linear_regression", "linear_3x3", "custom_layer", "scale"])
def test_computation_in_bfloat16(preset: str, framework: str) -> None:
    name, more = ("custom_layer", {"layer": "scale"}) if preset == "scale" else (preset, {})
    model = zoo.create(name, framework=framework, dtype="bfloat16", **more)
    features = zoo.get(name).config.in_features
    if framework == "torch":
        assert model(torch.ones(2, features)).dtype == torch.bfloat16
    else:
        assert model(jnp.ones((2, features))).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("names", "shape"), [(["weight", "bias"], (4,)), (["w", "v"], (1,)), (["1.weight", "x"], (2,))]
)
def test_other_models_are_not_taken_for_these(
    names: list[str], shape: tuple[int, ...], tmp_path: Path
) -> None:
    torch.save({n: torch.zeros(shape) for n in names}, tmp_path / "a.pt")
    with pytest.raises(ZooError):
        convert.convert(tmp_path / "a.pt")


def test_gradients_of_the_two_numbers() -> None:
    """dy/dw is x and dy/db is one, summed over the batch."""
    from flax import nnx

    model = zoo.create("linear_regression", framework="flax")
    x = jnp.asarray([[1.0], [2.0], [4.0]])
    graph, params = nnx.split(model)
    grads = jax.grad(lambda p: nnx.merge(graph, p)(x).sum())(params)
    assert grads["w"][...] == 7
    assert grads["b"][...] == 3
