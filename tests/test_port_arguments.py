"""`convert.port`: the arguments of constructors, and what follows from them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flax import nnx
from port_arguments import Block, Fixed, Stack

import convert
from convert.live.port_files import Port


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def stack() -> Port:
    torch.manual_seed(0)
    return convert.port(Stack, drawn(2, 5, 24), level="outputs")


def imported(port: Port, folder: Path) -> Any:
    (folder / "ported.py").write_text(port.source)
    spec = importlib.util.spec_from_file_location("ported", folder / "ported.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_sizes_are_written_by_the_arguments_that_they_follow_from(stack: Port) -> None:
    assert stack.proved.verdict == "same"
    text = " ".join(stack.source.split())
    for line in (
        "class Block(nnx.Module):",
        "self.heads = heads",
        "self.head_dim = dim // heads",
        "self.norm = nnx.LayerNorm(dim,",
        "self.qkv = nnx.Linear(dim, 3 * dim, rngs=rngs)",
        "self.mlp = Mlp(dim, dim * ratio, rngs=rngs)",
        "self.gamma = nnx.Param(jnp.full((dim,), 0.1))",
        "def __init__(self, dim: int = 24, heads: int = 3, *, rngs: nnx.Rngs) -> None:",
    ):
        assert line in text, stack.source


def test_the_class_is_torchs_with_other_arguments(stack: Port, tmp_path: Path) -> None:
    """With sizes that the port has never seen."""
    torch.manual_seed(1)
    module, x = Block(32, 4, 2), drawn(2, 3, 32)
    net = imported(stack, tmp_path).Block(32, heads=4, ratio=2, rngs=nnx.Rngs(0))
    layers = ("qkv", "proj", "mlp.up", "mlp.down")
    for name in layers:
        theirs, ours = module.get_submodule(name), net
        for part in name.split("."):
            ours = getattr(ours, part)
        ours.kernel[...] = theirs.weight.detach().numpy().T
        ours.bias[...] = theirs.bias.detach().numpy()
    with torch.no_grad():
        wanted = module(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(net(x), wanted, atol=1e-5)


def test_what_does_not_follow_stays_a_number() -> None:
    torch.manual_seed(0)
    made = convert.port(Fixed, drawn(2, 36), level="outputs")
    assert "def __init__(self, *, rngs: nnx.Rngs) -> None:" in made.source
    assert "nnx.Linear(12, 6, rngs=rngs)" in made.source
    assert "nnx.Linear(6, 11, rngs=rngs)" in made.source


class Scored(torch.nn.Module):
    """One argument is not used, and integers are divided."""

    def __init__(self) -> None:
        super().__init__()
        self.out = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, rewards: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        return self.out(x) + (steps / 7)[:, None]


def test_an_argument_that_is_not_used_stays() -> None:
    torch.manual_seed(0)
    inputs = {"x": drawn(4, 3), "rewards": drawn(4, 1), "steps": np.arange(4)}
    made = convert.port(Scored, inputs, level="outputs")
    assert made.proved.verdict == "same"
    assert "def __call__(self, x: Array, rewards: Array, steps: Array) -> Array:" in made.source
