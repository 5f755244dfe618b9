"""What only training tells: tensors that torch shares and Flax copies, weights masked once."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import convert

IDS = np.random.default_rng(0).integers(0, 11, (2, 5))


class TiedTorch(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 6)
        self.norm = torch.nn.LayerNorm(6)
        self.lm_head = torch.nn.Linear(6, 11, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, ids: Any) -> Any:
        return self.lm_head(self.norm(self.embedding(ids)))


class Tied(nnx.Module):
    """With a head of its own, or without."""

    def __init__(self, apart: bool) -> None:
        rngs = nnx.Rngs(0)
        self.table = nnx.Param(jnp.zeros((11, 6)))
        self.last = nnx.LayerNorm(6, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(6, 11, use_bias=False, rngs=rngs) if apart else None

    def __call__(self, ids: Any) -> Any:
        x = self.last(self.table[...][ids])
        return x @ self.table[...].T if self.head is None else self.head(x)


def tied(apart: bool) -> tuple[Any, Any]:
    torch.manual_seed(0)
    net, model = TiedTorch(), Tied(apart)
    table = jnp.asarray(net.embedding.weight.detach().numpy())
    model.table[...] = table
    if apart:
        model.head.kernel[...] = table.T
    return net.eval(), model


@pytest.mark.parametrize("level", ["gradients", "training"])
def test_copies_of_a_tied_tensor_train_apart(level: str) -> None:
    report = convert.verify(*tied(apart=True), IDS, level=level)
    assert report.verdict == "different"
    assert report.first_divergence.cause == "tied"
    assert report.first_divergence.layer == "embedding"
    told = report.first_divergence.diagnosis
    assert all(name in told for name in ("lm_head.weight", "table", "head.kernel"))


def test_a_shared_tensor_is_the_same_at_every_level() -> None:
    report = convert.verify(*tied(apart=False), IDS, level="training")
    assert report.verdict == "same", str(report)


def test_copies_are_a_blind_spot_of_outputs() -> None:
    report = convert.verify(*tied(apart=True), IDS)
    assert report.verdict == "same"
    spots = [s for s in report.blind_spots if s.kind == "training attribute"]
    assert any("embedding.weight" in s.names and "table" in s.names for s in spots)


def test_match_gives_each_copy_its_tensor() -> None:
    net, model = tied(apart=True)
    layout = convert.match(net, model, IDS)
    held = {t.name for e in layout.entries for t in e.flax}
    assert {"table", "head.kernel"} <= held


class MaskedTorch(torch.nn.Module):
    """A convolution that sees its left only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 3, 5))
        self.register_buffer("mask", torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]))
        self.out = torch.nn.Linear(4, 2)

    def forward(self, x: Any) -> Any:
        made = torch.nn.functional.conv1d(x, self.weight * self.mask, padding=2)
        return self.out(made.mean(-1))


class Masked(nnx.Module):
    def __init__(self) -> None:
        self.conv = nnx.Conv(3, 4, 5, padding=2, use_bias=False, rngs=nnx.Rngs(0))
        self.out = nnx.Linear(4, 2, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return self.out(self.conv(x).mean(1))


def test_weights_masked_only_when_they_are_loaded() -> None:
    torch.manual_seed(0)
    net, model = MaskedTorch().eval(), Masked()
    with torch.no_grad():
        net.weight *= net.mask
    model.conv.kernel[...] = jnp.asarray(net.weight.detach().numpy().transpose(2, 1, 0))
    model.out.kernel[...] = jnp.asarray(net.out.weight.detach().numpy().T)
    model.out.bias[...] = jnp.asarray(net.out.bias.detach().numpy())
    x = np.random.default_rng(0).standard_normal((2, 3, 9)).astype(np.float32)
    flax_inputs = x.transpose(0, 2, 1)
    report = convert.verify(net, model, x, level="gradients", flax_inputs=flax_inputs)
    assert report.verdict == "different"
    assert report.first_divergence.cause == "mask", report.first_divergence.diagnosis
    assert "24 of the 60 numbers of weight" in report.first_divergence.diagnosis
