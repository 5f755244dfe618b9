"""Tensors that were loaded from the wrong one, beside stacks and fused ones that hold several."""

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
from convert.diagnose.unseen import SeenValues
from convert.matching.bare import match_eliminated, match_left
from convert.matching.pair import Match, Pair
from convert.matching.pairing import pair_modules
from convert.matching.rearranged import match_values, with_copies
from convert.runtime.call import Call
from zoo import probe
from zoo.layout.ops import Permute, run

E, HIDDEN = 6, 4


def drawn(name: str, *shape: int) -> np.ndarray:
    return probe.normal(name, shape).astype(np.float32)


def test_a_stack_is_told_before_a_copy_of_one_of_its_layers() -> None:
    a, b, last = (drawn(n, 5) for n in "abc")
    found = match_values(
        {"h.0.w": a, "h.1.w": b, "norm.w": last}, {"norm.scale": b, "h.scale": np.stack([a, b])}
    )
    assert {m.flax: m.torch for m in found} == {("h.scale",): ("h.0.w", "h.1.w")}


def test_fused_kernels_of_a_stack_are_told() -> None:
    gates, ups = ([drawn(f"{n}{i}", 3, 5) for i in range(2)] for n in ("gate", "up"))
    ours = {f"{i}.{n}": x[i] for n, x in (("gate", gates), ("up", ups)) for i in range(2)}
    whole = np.stack([np.concatenate([g, u]).T for g, u in zip(gates, ups, strict=True)])
    (match,) = match_values(ours, {"experts.wi": whole})
    assert match.torch == ("0.gate", "0.up", "1.gate", "1.up")
    np.testing.assert_array_equal(run(match.ops, [ours[n] for n in match.torch])[0], whole)


def test_a_kernel_that_is_flipped_and_turned_is_told() -> None:
    x = drawn("up", 2, 3, 4, 5)
    y = np.flip(x.transpose(3, 2, 0, 1), (0, 1))
    (match,) = match_values({"up.weight": x}, {"kernel": y})
    np.testing.assert_array_equal(run(match.ops, [x])[0], y)


class Masked(nn.Conv1d):
    """Its mask stands in Flax's code."""

    def __init__(self) -> None:
        super().__init__(2, 3, 3, padding=1)
        self.register_buffer("mask", torch.tensor([1.0, 1.0, 0.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


def test_a_mask_of_ones_own_layer_may_stand_in_the_code() -> None:
    torch.manual_seed(0)
    net = Masked().eval()
    params = {"kernel": jnp.asarray(net.weight.detach().numpy().transpose(2, 1, 0)),
              "bias": jnp.asarray(net.bias.detach().numpy())}  # type: ignore[union-attr]  # fmt: skip

    def forward(p: Any, x: Any) -> Any:
        kernel = p["kernel"] * jnp.array([1.0, 1.0, 0.0])[:, None, None]
        dims = ("NCH", "HIO", "NCH")
        made = jax.lax.conv_general_dilated(x, kernel, (1,), [(1, 1)], dimension_numbers=dims)
        return made + p["bias"][:, None]

    for level in ("bits", "outputs"):
        assert convert.verify(net, (forward, params), drawn("x", 2, 2, 7), level).verdict == "same"


def test_single_numbers_are_told_within_a_tensor_of_several() -> None:
    ours = {f"c.{i}.bias": np.array([x], np.float32) for i, x in enumerate((0.3, 0.7))}
    (match,) = match_values(ours, {"c.b": np.array([[0.7], [0.3]], np.float32)})
    assert match.torch == ("c.1.bias", "c.0.bias")


def test_single_numbers_are_told_by_their_values_where_no_other_has_them() -> None:
    ours = {n: np.array([x], np.float32) for n, x in (("a", 0.1), ("b", 0.2), ("c", 0.5))}
    theirs = {n: np.array([x], np.float32) for n, x in (("z", 0.2), ("y", 0.1), ("x", 0.0))}
    assert {(m.torch, m.flax) for m in match_left(ours, theirs, [])} == {
        (("a",), ("y",)),
        (("b",), ("z",)),
    }
    twice = {n: np.array([0.25], np.float32) for n in "ab"}
    assert not list(match_left(twice, {"x": twice["a"], "y": ours["a"]}, []))


def test_a_copy_gives_way_to_the_tensor_that_holds_the_original() -> None:
    q, k, far = (drawn(n, E, E) for n in ("q", "k", "far"))
    copied = Match(("q.w",), ("wide",), (Permute((1, 0)),), "linear")
    tensors = {"q.w": q, "k.w": k, "far.w": far}
    left = {"k.w": k, "far.w": far}, {"qk": np.concatenate([q.T, k.T], 1)}
    ((whole, released),) = with_copies([copied], tensors, *left)
    assert (whole.torch, whole.flax, released) == (("q.w", "k.w"), ("qk",), [copied])
    (match,) = match_eliminated({"far.w": far}, {"wide": q.T}, tensors, [whole])
    assert (match.torch, match.flax) == (("far.w",), ("wide",))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.near, self.keys, self.far = (nn.Linear(E, E) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.near(x) * self.keys(x)) + self.far(x)


@pytest.mark.parametrize("copied", [False, True])
def test_what_was_copied_is_told(copied: bool) -> None:
    torch.manual_seed(0)
    net = Twice().eval()
    w = {n: jnp.asarray(t.detach().numpy().T) for n, t in net.state_dict().items()}
    far = "near" if copied else "far"
    params = {
        "both": {"kernel": jnp.concatenate([w["near.weight"], w["keys.weight"]], 1),
                 "bias": jnp.concatenate([w["near.bias"], w["keys.bias"]])},
        "wide": {"kernel": w[f"{far}.weight"], "bias": w[f"{far}.bias"]},
    }  # fmt: skip

    def forward(p: Any, x: Any) -> Any:
        near, keys = jnp.split(x @ p["both"]["kernel"] + p["both"]["bias"], 2, -1)
        return jnp.tanh(near * keys) + x @ p["wide"]["kernel"] + p["wide"]["bias"]

    report = convert.verify(net, (forward, params), drawn("x", 3, E), "bits")
    assert report.verdict == ("different" if copied else "same")
    if copied:
        assert {d.name for d in report.differences} == {"far.weight", "far.bias"}
        assert (report.first_divergence.layer, report.first_divergence.cause) == ("far", "values")


def test_masked_logits_are_no_larger_than_others() -> None:
    x = drawn("logits", 3, 4)
    mask = np.tril(np.ones((3, 4), bool))
    low = np.finfo(np.float32).min
    seen = SeenValues([np.where(mask, x, low)])
    assert seen.holds(np.where(mask, x, -np.inf).astype(np.float32))
    assert not seen.holds(np.where(mask, x + 1e-3, low))


# --- Two directions, the one that goes back called first ---


class Ours(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(E, HIDDEN, bidirectional=True)
        self.head = nn.Linear(2 * HIDDEN, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.head(self.rnn(x)[0]))


class Direction(nnx.Module):
    def __init__(self, of: nn.LSTM, end: str) -> None:
        tensors = {n: jnp.asarray(getattr(of, n + end).detach().numpy()) for n in
                   ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")}  # fmt: skip
        self.wx, self.wh = (nnx.Param(tensors[f"weight_{k}_l0"].T) for k in ("ih", "hh"))
        self.bx, self.bh = (nnx.Param(tensors[f"bias_{k}_l0"]) for k in ("ih", "hh"))

    def __call__(self, x: Any) -> Any:
        def step(carry: Any, u: Any) -> Any:
            h, c = carry
            i, f, g, o = jnp.split(u + h @ self.wh[...] + self.bh[...], 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        start = jnp.zeros((x.shape[1], HIDDEN), x.dtype)
        return jax.lax.scan(step, (start, start), x @ self.wx[...] + self.bx[...])[1]


class Theirs(nnx.Module):
    def __init__(self, of: Ours, fault: bool) -> None:
        self.onward, self.back = Direction(of.rnn, ""), Direction(of.rnn, "_reverse")
        self.head = nnx.Linear(2 * HIDDEN, 3, rngs=nnx.Rngs(0))
        self.head.kernel[...] = jnp.asarray(of.head.weight.detach().numpy().T)
        self.head.bias[...] = jnp.asarray(of.head.bias.detach().numpy())
        self.fault = fault

    def __call__(self, x: Any) -> Any:
        back = self.back(x[::-1])[::-1]
        made = self.head(jnp.concatenate([self.onward(x), back], -1))
        return jax.nn.sigmoid(made) if self.fault else jnp.tanh(made)


def test_directions_are_paired_by_what_they_are_given() -> None:
    torch.manual_seed(0)
    ours = Ours().eval()
    x = drawn("steps", 5, 2, E)
    theirs = Theirs(ours, False)
    theirs.eval()
    layers = {
        p.torch: p.flax for p in pair_modules(Pair(ours, theirs, Call((x,)), Call((x,)))).layers
    }
    assert (layers["rnn.l0"], layers["rnn.l0_reverse"]) == ("onward", "back")
    assert convert.verify(ours, theirs, x).verdict == "same"
    found = convert.verify(ours, Theirs(ours, True), x).first_divergence
    assert found is not None
    assert (found.layer, found.cause) == ("", "activation")


def test_vectors_of_torchs_own_parametrization_may_stand_in_the_code() -> None:
    torch.manual_seed(0)
    net = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4)).eval()
    held: Any = net.parametrizations
    held = held.weight
    u, v = (jnp.asarray(t.numpy()) for t in (held[0]._u, held[0]._v))
    params = {"kernel": jnp.asarray(held.original.detach().numpy().T),
              "bias": jnp.asarray(net.bias.detach().numpy())}  # fmt: skip

    def forward(p: Any, x: Any) -> Any:
        return x @ (p["kernel"] / (v @ p["kernel"] @ u)) + p["bias"]

    for level in ("bits", "outputs"):
        assert convert.verify(net, (forward, params), drawn("s", 2, 5), level).verdict == "same"
