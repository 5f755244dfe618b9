"""Layers that are one on one side and several on the other: stacks, scans, bare parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from torch import nn

import convert
from convert.matching.pair import Pair
from convert.matching.pairing import pair_modules
from convert.runtime.call import Call
from zoo import probe
from zoo.layout.ops import Permute, Stack

Array = Any
E, HIDDEN, LAYERS, H, KV = 8, 12, 3, 4, 2


def seeded(module: nn.Module) -> dict[str, np.ndarray]:
    for name, p in module.named_parameters():
        p.data = torch.from_numpy(probe.weight(name, tuple(p.shape))).float()
    module.eval()
    return {n: t.numpy() for n, t in module.state_dict().items()}


X = probe.normal("x", (2, 5, E)).astype(np.float32)


# --- Stacked, bidirectional LSTM against one cell a layer and direction ---


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(E, 3, 2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0])


class FlaxLstm(linen.Module):
    fault: str = ""

    @linen.compact
    def __call__(self, x: Array) -> Array:
        for i in range(2):
            gate = linen.hard_sigmoid if self.fault == "gate" and i else linen.sigmoid
            ahead = linen.RNN(linen.OptimizedLSTMCell(3, gate_fn=gate))(x)
            back = linen.RNN(linen.OptimizedLSTMCell(3), reverse=True, keep_order=True)(x)
            x = jnp.concatenate([ahead, back], -1)
        return linen.Dense(4)(x)


def lstm_pair(fault: str = "") -> tuple[nn.Module, Any]:
    a = Lstm()
    w = seeded(a)
    params: dict[str, Any] = {"Dense_0": {"kernel": w["head.weight"].T, "bias": w["head.bias"]}}
    ends = [f"_l{i}{way}" for i in range(2) for way in ("", "_reverse")]
    for k, end in enumerate(ends):
        both = w[f"rnn.bias_ih{end}"] + w[f"rnn.bias_hh{end}"]
        cell: dict[str, Any] = {}
        for j, gate in enumerate("ifgo"):
            rows = slice(3 * j, 3 * j + 3)
            cell[f"i{gate}"] = {"kernel": w[f"rnn.weight_ih{end}"][rows].T}
            cell[f"h{gate}"] = {"kernel": w[f"rnn.weight_hh{end}"][rows].T, "bias": both[rows]}
        if fault == "gates" and k == 2:
            cell["hi"], cell["hf"] = cell["hf"], cell["hi"]
        params[f"OptimizedLSTMCell_{k}"] = cell
    return a, (FlaxLstm(fault), {"params": params})


def test_a_stacked_lstm_is_paired_layer_by_layer() -> None:
    report = convert.verify(*lstm_pair(), X, level="outputs")
    assert report.verdict == "same"
    names = [r.name for r in report.layers]
    assert names == ["rnn.l0:0", "rnn.l0_reverse:0", "rnn.l1:0", "rnn.l1_reverse:0", "head"]
    assert report.compared == 10, "four input and four hidden weights, and the head"
    assert not any("jit, scan or vmap" in n for n in report.notices)


@pytest.mark.parametrize(
    ("fault", "said", "tensor"),
    [
        ("gate", "l1 of rnn", None),
        ("gates", "l1 of rnn", "rnn.weight_hh_l1"),
    ],
)
def test_faults_of_a_stacked_lstm_are_placed(fault: str, said: str, tensor: str | None) -> None:
    found = convert.verify(*lstm_pair(fault), X, level="outputs").first_divergence
    assert found is not None
    assert (found.layer, found.between, found.tensor) == ("rnn", None, tensor)
    assert found.diagnosis.startswith(said)


# --- Layers that are scanned ---


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(E)
        self.q = nn.Linear(E, E)
        self.k = nn.Linear(E, E)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.q(y) * torch.tanh(self.k(y))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class LinenBlock(linen.Module):
    gate: Any = jnp.tanh

    @linen.compact
    def __call__(self, x: Array, _: Any = None) -> Any:
        y = linen.LayerNorm(epsilon=1e-5, name="norm")(x)
        return x + linen.Dense(E, name="q")(y) * self.gate(linen.Dense(E, name="k")(y)), None


class LinenNet(linen.Module):
    gate: Any = jnp.tanh

    @linen.compact
    def __call__(self, x: Array) -> Array:
        stack = linen.scan(
            LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )
        return stack(self.gate, name="layers")(x, None)[0]


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(E, epsilon=1e-5, rngs=rngs)
        self.q, self.k = (nnx.Linear(E, E, rngs=rngs) for _ in range(2))

    def __call__(self, x: Array) -> Array:
        y = self.norm(x)
        return x + self.q(y) * jnp.tanh(self.k(y))


class NnxNet(nnx.Module):
    def __init__(self) -> None:
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> NnxBlock:
            return NnxBlock(rngs)

        self.layers = stack(nnx.Rngs(0))

    def __call__(self, x: Array) -> Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x: Array, block: NnxBlock) -> Array:
            return block(x)

        return run(x, self.layers)


def scanned(kind: str, fault: str = "") -> tuple[nn.Module, Any]:
    a = Net()
    w = seeded(a)

    def stacked(name: str, turn: bool = False) -> np.ndarray:
        arrays = [w[f"layers.{i}.{name}"] for i in range(LAYERS)]
        return np.stack([x.T if turn else x for x in arrays])

    params: dict[str, Any] = {
        "norm": {"scale": stacked("norm.weight"), "bias": stacked("norm.bias")},
        **{n: {"kernel": stacked(f"{n}.weight", True), "bias": stacked(f"{n}.bias")} for n in "qk"},
    }
    if fault == "swapped":
        q, k = params["q"]["kernel"], params["k"]["kernel"]
        q[1], k[1] = k[1].copy(), q[1].copy()
    if kind == "linen":
        gate = jax.nn.sigmoid if fault == "gate" else jnp.tanh
        return a, (LinenNet(gate), {"params": {"layers": params}})
    b = NnxNet()
    for name, leaves in params.items():
        for leaf, value in leaves.items():
            getattr(getattr(b.layers, name), leaf)[...] = value
    return a, b


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_scanned_layers_are_paired_and_judged_one_by_one(kind: str) -> None:
    report = convert.verify(*scanned(kind), X, level="outputs")
    assert report.verdict == "same"
    assert report.compared == 6 * LAYERS
    expected = [f"layers.{i}.{n}" for i in range(LAYERS) for n in ("norm", "q", "k")]
    assert [r.name for r in report.layers] == expected
    assert all(r.error64 <= 1e-10 * r.scale for r in report.layers)
    assert not report.notices


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_the_tensor_at_fault_in_a_stack_is_named_as_torch_names_it(kind: str) -> None:
    found = convert.verify(*scanned(kind, "swapped"), X, level="outputs").first_divergence
    assert found is not None
    assert (found.layer, found.tensor, found.cause) == (
        "layers.1.q",
        "layers.1.q.weight",
        "swapped",
    )


def test_code_at_fault_in_a_scanned_layer_is_placed() -> None:
    found = convert.verify(*scanned("linen", "gate"), X, level="outputs").first_divergence
    assert found is not None
    assert found.layer == "layers.0"
    assert found.between == ("layers.0.k", "layers.1")


def test_a_stack_is_a_layout() -> None:
    a, (b, variables) = scanned("linen")
    found = pair_modules(Pair(a, b.bind(variables), Call((X,)), Call((X,))))
    assert found.complete
    entry = next(e for e in found.layout().entries if e.flax[0].name == "layers.q.kernel")
    assert [t.name for t in entry.torch] == [f"layers.{i}.q.weight" for i in range(LAYERS)]
    assert entry.ops == (Stack(0), Permute((0, 2, 1)))


# --- Own norms, weight_norm, bare parameters ---


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(E))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(E))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gamma * x


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, E))
        self.pre, self.post = Norm(), Norm()
        self.ls1, self.ls2 = Scale(), Scale()
        conv = nn.Conv1d(E, 6, 3, padding=1)
        self.conv = torch.nn.utils.parametrizations.weight_norm(conv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = self.ls2(self.post(self.ls1(self.pre(x))))
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Rms(nnx.Module):
    def __init__(self, epsilon: float) -> None:
        self.g, self.epsilon = nnx.Param(jnp.ones(E)), epsilon

    def __call__(self, x: Array) -> Array:
        return self.g[...] * x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.epsilon)


class WeightNorm(nnx.Module):
    def __init__(self) -> None:
        self.g = nnx.Param(jnp.ones((1, 1, 6)))
        self.v = nnx.Param(jnp.ones((3, E, 6)))
        self.bias = nnx.Param(jnp.zeros(6))

    def __call__(self, x: Array) -> Array:
        v = self.v[...]
        kernel = self.g[...] * v / jnp.sqrt((v * v).sum((0, 1), keepdims=True))
        return (
            jax.lax.conv_general_dilated(
                x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            )
            + self.bias[...]
        )


class FlaxMixed(nnx.Module):
    def __init__(self, epsilon: float) -> None:
        self.cls = nnx.Param(jnp.zeros((1, E)))
        self.before, self.after = Rms(1e-6), Rms(epsilon)
        self.gamma_1, self.gamma_2 = nnx.Param(jnp.ones(E)), nnx.Param(jnp.ones(E))
        self.pos_conv = WeightNorm()

    def __call__(self, x: Array) -> Array:
        cls = jnp.broadcast_to(self.cls[...], (len(x), 1, E))
        x = self.before(jnp.concatenate([cls, x], 1))
        return self.pos_conv(self.gamma_2[...] * self.after(self.gamma_1[...] * x))


def mixed(epsilon: float = 1e-6) -> tuple[nn.Module, nnx.Module]:
    a, b = Mixed(), FlaxMixed(epsilon)
    w = seeded(a)
    b.cls[...] = w["cls_token"][0]
    b.before.g[...], b.after.g[...] = w["pre.weight"], w["post.weight"]
    b.gamma_1[...], b.gamma_2[...] = w["ls1.gamma"], w["ls2.gamma"]
    b.pos_conv.g[...] = w["conv.parametrizations.weight.original0"].transpose(2, 1, 0)
    b.pos_conv.v[...] = w["conv.parametrizations.weight.original1"].transpose(2, 1, 0)
    b.pos_conv.bias[...] = w["conv.bias"]
    return a, b


def test_own_layers_and_bare_parameters_are_paired() -> None:
    report = convert.verify(*mixed(), X, level="bits")
    assert report.verdict == "same", report.differences
    assert report.compared == 8
    found = convert.verify(*mixed(1e-2), X, level="outputs").first_divergence
    assert found is not None
    assert (found.layer, found.flax_layer) == ("post", "after")


# --- Grouped attention ---


def rotated(x: Any, theta: float, cat: Any) -> Any:
    """x (B, T, N, D), of either framework."""
    T, D = x.shape[1], x.shape[-1]
    angle = np.arange(T)[:, None, None] * theta ** (-np.arange(0, D, 2) / D)
    cos, sin = (f(angle).astype(np.float32) for f in (np.cos, np.sin))
    if isinstance(x, torch.Tensor):
        cos, sin = torch.from_numpy(cos).to(x), torch.from_numpy(sin).to(x)
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return cat([a * cos - b * sin, b * cos + a * sin], -1)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = (nn.Linear(16, 16, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(16, 8, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 4)) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rotated(y, 1e4, torch.cat) for y in (q, k))
        k, v = (y.repeat_interleave(H // KV, 2) for y in (k, v))
        logits = torch.einsum("btnd,bsnd->bnts", q, k) * 0.5
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = logits.masked_fill(later, -torch.inf).softmax(-1)
        return self.o_proj(torch.einsum("bnts,bsnd->btnd", weights, v).flatten(2))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attn = nn.Linear(E, 16), Grouped()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        return x + self.attn(x)


class FlaxGrouped(linen.Module):
    """Heads apart, as DenseGeneral gives them."""

    fault: str

    @linen.compact
    def __call__(self, x: Array) -> Array:
        q, k, v = (
            linen.DenseGeneral((n, 4), use_bias=False, name=f"{name}_proj")(x)
            for name, n in (("q", H), ("k", KV), ("v", KV))
        )
        theta = 5e5 if self.fault == "theta" else 1e4
        q, k = (rotated(y, theta, jnp.concatenate) for y in (q, k))
        if self.fault == "repeat":
            k, v = (jnp.tile(y, (1, 1, H // KV, 1)) for y in (k, v))
        else:
            k, v = (jnp.repeat(y, H // KV, 2) for y in (k, v))
        logits = jnp.einsum("btnd,bsnd->bnts", q, k) * (0.25 if self.fault == "scale" else 0.5)
        seen = jnp.tril(jnp.ones((x.shape[1],) * 2, bool), int(self.fault == "mask"))
        weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), -1)
        out = jnp.einsum("bnts,bsnd->btnd", weights, v)
        return linen.DenseGeneral(16, (-2, -1), use_bias=False, name="o_proj")(out)


class FlaxOuter(linen.Module):
    fault: str = ""

    @linen.compact
    def __call__(self, x: Array) -> Array:
        x = linen.Dense(16, name="embed")(x)
        return x + FlaxGrouped(self.fault, name="attn")(x)


@pytest.mark.parametrize("fault", ["", "theta", "repeat", "mask"])
def test_faults_of_grouped_attention_are_placed(fault: str) -> None:
    a = Outer()
    w = seeded(a)
    attn: dict[str, Any] = {
        n: {"kernel": w[f"attn.{n}.weight"].T.reshape(16, -1, 4)}
        for n in ("q_proj", "k_proj", "v_proj")
    }
    attn["o_proj"] = {"kernel": w["attn.o_proj.weight"].T.reshape(H, 4, 16)}
    embed = {"kernel": w["embed.weight"].T, "bias": w["embed.bias"]}
    b = (FlaxOuter(fault), {"params": {"embed": embed, "attn": attn}})
    report = convert.verify(a, b, 3 * X, level="outputs")
    found = report.first_divergence
    if not fault:
        assert report.verdict == "same"
        assert {r.name for r in report.layers} >= {"attn.q_proj", "attn.k_proj", "attn.v_proj"}
        return
    assert found is not None
    assert found.layer == "attn"
    assert found.between == ("attn.v_proj", "attn.o_proj")


# --- The same values in another shape, in fewer tensors or in more ---


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(E, HIDDEN, bias=False) for _ in range(3))
        self.mix = nn.Conv1d(5, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mix(x)
        return torch.tanh(self.q(x)) * self.k(x) + self.v(x)


def heads(params: Array, x: Array, gate: Any = jnp.tanh) -> Array:
    x = jnp.einsum("oi,bie->boe", params["mix"], x) + params["bias"][:, None]
    q = jnp.einsum("bte,hec->bthc", x, params["q"]).reshape(2, 5, HIDDEN)
    k, v = jnp.einsum("bte,shec->sbthc", x, params["kv"]).reshape(2, 2, 5, HIDDEN)
    return gate(q) * k + v


def heads_pair() -> tuple[nn.Module, Any]:
    a = Heads()
    w = seeded(a)

    def cut(x: np.ndarray) -> np.ndarray:
        return x.reshape(H, HIDDEN // H, E).transpose(0, 2, 1)

    kv = np.stack([cut(w["k.weight"]), cut(w["v.weight"])])
    mix, bias = w["mix.weight"][..., 0], w["mix.bias"]
    return a, (heads, {"q": cut(w["q.weight"]), "kv": kv, "mix": mix, "bias": bias})


def test_tensors_in_other_shapes_are_paired_by_their_values() -> None:
    a, b = heads_pair()
    assert convert.verify(a, b, X, level="bits").verdict == "same"


def test_of_a_function_the_layer_at_fault_is_told_by_its_values() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down = nn.Linear(E, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, E)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.act(self.up(x)))

    def gated(p: Array, x: Array) -> Array:
        y = jax.nn.sigmoid(x @ p["up"] + p["up_bias"])
        return y @ p["down"] + p["down_bias"]

    a = Gated()
    w = seeded(a)
    params = {n: w[f"{n}.weight"].T for n in ("up", "down")}
    params |= {f"{n}_bias": w[f"{n}.bias"] for n in ("up", "down")}
    report = convert.verify(a, (gated, params), X, explain=0)
    assert report.first_divergence is not None
    assert report.first_divergence.layer == "act"


def test_of_a_function_what_is_cut_off_later_is_no_fault() -> None:
    """torch's convolution gives more steps than are kept, which Flax never computes."""

    class Filter(nn.Module):
        def forward(self, x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x).cumsum(-1) * k

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.short = nn.Conv1d(E, E, 3, padding=2)
            self.filter, self.down = Filter(), nn.Linear(E, E)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.short(x.transpose(1, 2))[..., : x.shape[1]]
            return self.down(self.filter(y, y.mean(-1, keepdim=True)).transpose(1, 2))

    def causal(p: Array, x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (2, 0), (0, 0)))
        y = sum(padded[:, i : i + x.shape[1]] @ p["short"][i] for i in range(3)) + p["short_bias"]
        y = jnp.cumsum(jax.nn.sigmoid(y), 1) * y.mean(1, keepdims=True)
        return y @ p["down"] + p["down_bias"]

    a = Causal()
    w = seeded(a)
    params = {"short": w["short.weight"].transpose(2, 1, 0), "short_bias": w["short.bias"],
              "down": w["down.weight"].T, "down_bias": w["down.bias"]}  # fmt: skip
    found = convert.verify(a, (causal, params), X, explain=0).first_divergence
    assert found is not None
    assert found.layer == "filter"
