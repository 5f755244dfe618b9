"""A gradient that is stopped on one side only is placed: all gradients are explained at once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import convert


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.scale = nn.Linear(6, 6), nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = torch.tanh(self.mix(x)).chunk(2, -1)
        decay = torch.exp(-self.scale)
        return x * decay + torch.cat((a * b, b), -1)


class Net(nn.Module):
    """Two layers of one code, a value that is detached, a stretch without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList([Gate(), Gate()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for gate in self.gates:
            x = gate(x)
        centred = x - x.mean(-1, keepdim=True).detach()
        with torch.no_grad():
            size = centred.abs().amax(-1, keepdim=True)
        return centred / (1 + size)


CODE = """
def flax_net(params, x):
    for p in params:
        a, b = jnp.split(jnp.tanh(x @ p["w"] + p["b"]), 2, -1)
        decay = jnp.exp(-p["scale"])
        x = x * decay + jnp.concatenate((a * b, b), -1)
    centred = x - stop(x.mean(-1, keepdims=True))
    size = stop(jnp.abs(centred).max(-1, keepdims=True))
    return centred / (1 + size)
"""


def cause_of(old: str, new: str) -> Any:
    torch.manual_seed(0)
    net = Net()
    params = [
        {"w": jnp.asarray(g.mix.weight.detach().numpy().T),
         "b": jnp.asarray(g.mix.bias.detach().numpy()),
         "scale": jnp.asarray(g.scale.detach().numpy())} for g in net.gates
    ]  # fmt: skip
    assert old in CODE
    space: dict[str, Any] = {"jnp": jnp, "stop": jax.lax.stop_gradient}
    exec(CODE.replace(old, new), space)
    x = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    report = convert.verify(net, (space["flax_net"], params), x, level="gradients")
    return report.first_divergence


def test_the_right_pair_is_the_same() -> None:
    assert cause_of("stop", "stop") is None


@pytest.mark.parametrize(("old", "new", "layers", "words"), [
    ("a * b, b), -1)", "a * stop(b), b), -1)", {"gates.0"}, "operand 2 of `a * b`"),
    ("x * decay", "x * stop(decay)", {"gates.0"}, "operand 2 of `x * decay`"),
    ("for p in params:", "for p in params:\n        x = stop(x) if p is params[1] else x",
     {"gates.0"}, "is detached"),
    ("centred = x - stop(x.mean", "centred = x - (x.mean", {""}, "torch detaches in `x.mean"),
    ("size = stop(jnp", "size = (jnp", {""}, "no_grad"),
])  # fmt: skip
def test_a_stop_on_one_side_is_placed(old: str, new: str, layers: set[str], words: str) -> None:
    found = cause_of(old, new)
    assert found is not None
    assert found.cause == "stop_gradient"
    assert found.layer in layers
    assert words in found.diagnosis
    assert found.source is None or "test_stopped.py" in found.source


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.rate = nn.Embedding(7, 4, padding_idx=0), nn.Parameter(torch.rand(4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.table(ids) * self.rate)  # type: ignore[no-any-return]


class FlaxTable(nnx.Module):
    def __init__(self, net: Table, trained: bool, padded: bool) -> None:
        self.table = nnx.Embed(7, 4, rngs=nnx.Rngs(0))
        self.table.embedding[...] = jnp.asarray(net.table.weight.detach().numpy())
        kind = nnx.Param if trained else nnx.Variable
        self.rate = kind(jnp.asarray(net.rate.detach().numpy()))
        self.padded = padded

    def __call__(self, ids: Any) -> Any:
        x = self.table(ids)
        x = jnp.where((ids == 0)[..., None], jax.lax.stop_gradient(x), x) if self.padded else x
        return jnp.tanh(x * self.rate[...])


@pytest.mark.parametrize(("trained", "padded", "cause", "layer"), [
    (True, True, None, ""),
    (False, True, "stop_gradient", ""),
    (True, False, "padding_idx", "table"),
])  # fmt: skip
def test_what_is_not_trained_on_one_side_is_named(
    trained: bool, padded: bool, cause: str | None, layer: str
) -> None:
    torch.manual_seed(0)
    net = Table().eval()
    with torch.no_grad():
        net.table.weight[0] = torch.rand(4)
    ids = np.array([[0, 1, 2], [3, 4, 0]])
    report = convert.verify(net, FlaxTable(net, trained, padded), ids, level="gradients")
    found = report.first_divergence
    assert (found and found.cause) == cause
    assert found is None or found.layer == layer
