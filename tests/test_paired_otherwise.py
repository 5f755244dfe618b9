"""Weights and values that lie in one array on one side and in several, or in a longer one, on the
other: right pairs are the same, and a fault behind them is told as what it is."""

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
from tests.test_right_pairs import Torch, arrays
from zoo import probe

C, N = 4, 5


class Many(nn.Module):
    """One layer for each variable, then two of the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList(nn.Linear(C, C) for _ in range(3))
        self.inner, self.outer = nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x: Any) -> Any:
        y = torch.stack([layer(x[:, i]) for i, layer in enumerate(self.each)], 1).mean(1)
        return self.outer(torch.tanh(self.inner(y)))


class FlaxMany(nnx.Module):
    """The layers of all variables in one array."""

    def __init__(self, net: Many) -> None:
        held = arrays(net)
        weights = [held[f"each.{i}.weight"].T for i in range(3)]
        self.w = nnx.Param(jnp.stack(weights))
        self.b = nnx.Param(jnp.stack([held[f"each.{i}.bias"] for i in range(3)]))
        self.one, self.two = (nnx.Linear(C, C, rngs=nnx.Rngs(0)) for _ in range(2))
        for mine, name in ((self.one, "inner"), (self.two, "outer")):
            mine.kernel[...] = held[f"{name}.weight"].T
            mine.bias[...] = held[f"{name}.bias"]

    def __call__(self, x: Any) -> Any:
        y = (jnp.einsum("bnc,ncd->bnd", x, self.w[...]) + self.b[...]).mean(1)
        return self.two(jnp.tanh(self.one(y)))


def test_weights_in_one_array_are_no_other_layers() -> None:
    torch.manual_seed(0)
    net, x = Many().eval(), probe.normal("x", (2, 3, C)).astype(np.float32)
    report = convert.verify(net, FlaxMany(net), x, level="gradients")
    assert report.verdict == "same"


def test_single_numbers_pair_by_their_values() -> None:
    def ours(self: Any, x: Any) -> Any:
        for i in range(6):
            x = getattr(self, f"act_{i}_2")(getattr(self, f"fc_{i}")(x))
        return x

    def theirs(p: dict[str, Any], x: Any) -> Any:
        for i in (0, 1, 2, 3, 4, 5):
            block = p[f"block_{i}"]
            x = x @ block["w"] + block["b"]
            x = jnp.where(x >= 0, x, block["slope2"] * x)
        return x

    layers = {f"fc_{i}": nn.Linear(C, C) for i in range(6)}
    layers |= {f"act_{i}_2": nn.PReLU(init=0.1 + 0.05 * i) for i in range(6)}  # type: ignore[misc]
    net = Torch(ours, **layers).eval()
    held = arrays(net)
    params = {
        f"block_{i}": {"w": held[f"fc_{i}.weight"].T, "b": held[f"fc_{i}.bias"],
                       "slope2": held[f"act_{i}_2.weight"]} for i in range(6)
    }  # fmt: skip
    x = probe.normal("x", (3, C)).astype(np.float32)
    assert convert.verify(net, (theirs, params), x, level="gradients").verdict == "same"


class Edges(nn.Module):
    """Messages along a list of edges, all but those from a node to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.gate, self.node = nn.Linear(2 * C, C), nn.Linear(C, 1), nn.Linear(C, C)

    def forward(self, h: Any) -> Any:
        i, j = torch.tensor([(i, j) for i in range(N) for j in range(N) if i != j]).T
        m = torch.tanh(self.message(torch.cat([h[i], h[j]], -1)))
        m = m * torch.sigmoid(self.gate(m))
        return self.node(h + torch.zeros_like(h).index_add(0, i, m))


class Grid(nnx.Module):
    """The same on the whole grid, with the diagonal masked."""

    def __init__(self, net: Edges, fault: bool) -> None:
        held, self.fault = arrays(net), fault
        for name, (a, b) in {"message": (2 * C, C), "gate": (C, 1), "node": (C, C)}.items():
            layer = nnx.Linear(a, b, rngs=nnx.Rngs(0))
            layer.kernel[...], layer.bias[...] = held[f"{name}.weight"].T, held[f"{name}.bias"]
            setattr(self, name, layer)

    def __call__(self, h: Any) -> Any:
        left, right = jnp.broadcast_arrays(h[:, None], h[None])
        m = jnp.tanh(self.message(jnp.concatenate([left, right], -1)))
        m = m * (jnp.tanh if self.fault else jax.nn.sigmoid)(self.gate(m))
        return self.node(h + (m * (1 - jnp.eye(N))[..., None]).sum(1))


@pytest.mark.parametrize("fault", [False, True])
def test_values_beside_more_of_them_are_right(fault: bool) -> None:
    torch.manual_seed(1)
    net, h = Edges().eval(), probe.normal("h", (N, C)).astype(np.float32)
    report = convert.verify(net, Grid(net, fault), h)
    assert report.verdict == ("different" if fault else "same")
    first = report.first_divergence
    if fault:
        assert first is not None
        assert first.cause == "activation" or "torch.sigmoid(self.gate(m))" in first.diagnosis


def test_a_function_with_parameters_is_matched() -> None:
    def ours(self: Any, x: Any) -> Any:
        return self.head(torch.relu(self.fc(x)))

    def theirs(p: dict[str, Any], x: Any) -> Any:
        h = jax.nn.relu(x @ p["a"]["w"] + p["a"]["b"])
        return h @ p["z"]["w"] + p["z"]["b"]

    net = Torch(ours, fc=nn.Linear(3, C), head=nn.Linear(C, 2)).eval()
    empty = {"a": {"w": np.zeros((3, C), np.float32), "b": np.zeros(C, np.float32)},
             "z": {"w": np.zeros((C, 2), np.float32), "b": np.zeros(2, np.float32)}}  # fmt: skip
    x = probe.normal("x", (5, 3)).astype(np.float32)
    layout = convert.match(net, (theirs, jax.tree.map(jnp.asarray, empty)), x)
    pairs = {e.torch[0].name: e.flax[0].name for e in layout.entries}
    assert pairs == {"fc.weight": "a.w", "fc.bias": "a.b", "head.weight": "z.w", "head.bias": "z.b"}


class Own(nn.Module):
    """A Linear of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(C, C))

    def forward(self, x: Any) -> Any:
        return x @ self.weight.T


def test_a_square_matrix_of_ones_own_layer_lies_as_its_values_do() -> None:
    class FlaxOwn(nnx.Module):
        def __init__(self, kernel: Any) -> None:
            self.kernel = nnx.Param(kernel)

        def __call__(self, x: Any) -> Any:
            return x @ self.kernel

    class Flax(nnx.Module):
        def __init__(self, net: nn.Module) -> None:
            held = arrays(net)
            self.a, self.b = FlaxOwn(held["a.weight"].T), FlaxOwn(held["b.weight"].T)

        def __call__(self, x: Any) -> Any:
            return self.b(jnp.tanh(self.a(x)))

    net = Torch(lambda m, x: m.b(torch.tanh(m.a(x))), a=Own(), b=Own()).eval()
    x = probe.normal("x", (3, C)).astype(np.float32)
    assert convert.verify(net, Flax(net), x, level="gradients").verdict == "same"
