"""Every paired leaf layer judged by itself, in float64, fed torch's own inputs."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import convert
from convert.diagnose.explain import Explainer
from zoo import probe

E, N, T = 8, 2, 5


class Torch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(E, N, batch_first=True)
        self.norm = nn.LayerNorm(E, eps=1e-6)
        self.head = nn.Linear(E, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x + self.attn(x, x, x, need_weights=False)[0]))


class Flax(nnx.Module):
    def __init__(self, epsilon: float) -> None:
        rngs = nnx.Rngs(0)
        self.attn = nnx.MultiHeadAttention(N, E, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(E, epsilon=epsilon, rngs=rngs)
        self.head = nnx.Linear(E, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.norm(x + self.attn(x)))


def seeded(module: nn.Module) -> dict[str, np.ndarray]:
    for name, p in module.named_parameters():
        p.data = torch.from_numpy(probe.weight(name, tuple(p.shape))).float()
    module.eval()
    return {n: t.numpy() for n, t in module.state_dict().items()}


def pair(epsilon: float = 1e-6) -> tuple[nn.Module, nnx.Module]:
    a, b = Torch(), Flax(epsilon)
    w = seeded(a)
    qkv = zip((b.attn.query, b.attn.key, b.attn.value), range(3), strict=True)
    for layer, i in qkv:
        rows = slice(i * E, (i + 1) * E)
        layer.kernel[...] = w["attn.in_proj_weight"][rows].T.reshape(E, N, E // N)
        layer.bias[...] = w["attn.in_proj_bias"][rows].reshape(N, E // N)
    b.attn.out.kernel[...] = w["attn.out_proj.weight"].T.reshape(N, E // N, E)
    b.attn.out.bias[...] = w["attn.out_proj.bias"]
    b.norm.scale[...], b.norm.bias[...] = w["norm.weight"], w["norm.bias"]
    b.head.kernel[...], b.head.bias[...] = w["head.weight"].T, w["head.bias"]
    return a, b


def inputs(scale: float = 3.0) -> np.ndarray:
    return (scale * probe.normal("x", (2, T, E))).astype(np.float32)


def test_an_epsilon_behind_a_float32_softmax_is_seen_and_named() -> None:
    report = convert.verify(*pair(1.1e-6), inputs(), level="outputs")
    assert all(r.same for r in report.outputs), "float32 alone cannot tell"
    assert report.verdict == "different"
    bad = [r for r in report.layers if not r.same]
    assert [r.name for r in bad] == ["norm"]
    assert report.first_divergence is not None
    assert report.first_divergence.layer == "norm"
    assert report.first_divergence.cause == "epsilon"
    assert report.first_divergence.flax_layer == "norm"


def test_what_stays_in_float32_is_data_and_is_said() -> None:
    report = convert.verify(*pair(), inputs(), level="outputs")
    assert report.verdict == "same"
    rows = {r.name: r for r in report.layers}
    assert list(rows) == ["attn:0", "norm", "head"]
    assert rows["attn:0"].note.startswith("in float32 only")
    assert not rows["norm"].note
    assert rows["norm"].error64 <= 1e-10 * rows["norm"].scale
    assert rows["norm"].layer == "LayerNorm"
    assert [s.names for s in report.blind_spots if s.kind == "float32 only"][-1] == ("attn:0",)
    data = json.loads(report.to_json())
    assert [r["name"] for r in data["layers"]] == list(rows)
    assert all("ratio" in r for r in data["layers"])


class Own(nn.Module):
    """A linear layer and its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(E, E))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.weight.T)


class FlaxOwn(nnx.Module):
    def __init__(self, epsilon: float = 0.0) -> None:
        self.weight, self.epsilon = nnx.Param(jnp.zeros((E, E))), epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.weight[...].T + self.epsilon


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = Own()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.own(x)


class FlaxAround(nnx.Module):
    def __init__(self) -> None:
        self.own = FlaxOwn()

    def __call__(self, x: jax.Array) -> jax.Array:
        return 2 * jax.nn.relu(self.own(x))


def test_own_layers_that_end_at_different_places_are_not_judged() -> None:
    a, b = Around(), FlaxAround()
    b.own.weight[...] = seeded(a)["own.weight"]
    report = convert.verify(a, b, inputs(), level="outputs")
    assert report.verdict == "same"
    assert [(r.name, r.judged) for r in report.layers] == [("own", False)]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTMCell(E, E)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = None
        for step in x.unbind(1):
            state = self.lstm(step, state)
        return state[0]


class FlaxRecurrent(nnx.Module):
    def __init__(self) -> None:
        self.lstm = nnx.OptimizedLSTMCell(E, E, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        state: Any = (jnp.zeros((len(x), E), x.dtype),) * 2
        for i in range(x.shape[1]):
            state, out = self.lstm(state, x[:, i])
        return out


def test_biases_summed_in_float32_are_allowed_their_rounding() -> None:
    a, b = Recurrent(), FlaxRecurrent()
    w = seeded(a)
    b.lstm.dense_i.kernel[...] = w["lstm.weight_ih"].T
    b.lstm.dense_h.kernel[...] = w["lstm.weight_hh"].T
    b.lstm.dense_h.bias[...] = w["lstm.bias_ih"] + w["lstm.bias_hh"]
    report = convert.verify(a, b, inputs(1.0), level="outputs")
    assert report.verdict == "same", [r for r in report.layers if not r.same]
    assert report.layers
    assert max(r.error64 / r.scale for r in report.layers) > 1e-10


@pytest.mark.parametrize("place", ["attn", "norm"])
def test_what_explaining_raises_does_not_lose_the_place(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, *rest: Any) -> Any:
        raise ValueError("operands could not be broadcast together")

    monkeypatch.setattr(Explainer, "_case", broken)
    a, b = pair(0.1 if place == "norm" else 1e-6)
    if place == "attn":
        b.attn.attention_fn = lambda q, k, v, **_: 2 * v
    report = convert.verify(a, b, inputs(), level="outputs")
    assert report.first_divergence is not None
    assert report.first_divergence.layer == place
    assert report.first_divergence.cause == "unknown"
