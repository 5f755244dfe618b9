"""What `verify` takes besides two plain modules: functions, caches, 16 bits, random numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from torch import nn
from torch.nn import functional as F

import convert
from convert.compare.report import Report

X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


class Dense(nn.Module):
    """One layer, so that what is around it is what a test is about."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.fc(x)


class DenseNnx(nnx.Module):
    def __init__(self, ours: nn.Module, dtype: Any = None, held: Any = jnp.float32) -> None:
        self.fc = nnx.Linear(4, 4, dtype=dtype, param_dtype=held, rngs=nnx.Rngs(0))
        self.fc.kernel[...] = weights(ours, held)["kernel"]
        self.fc.bias[...] = weights(ours, held)["bias"]

    def __call__(self, x: Any) -> Any:
        return self.fc(x)


def weights(ours: Any, dtype: Any = jnp.float32) -> dict[str, Any]:
    kernel, bias = (np.asarray(t.detach().float()) for t in (ours.fc.weight, ours.fc.bias))
    return {"kernel": jnp.asarray(kernel.T, dtype), "bias": jnp.asarray(bias, dtype)}


def told(report: Report, text: str) -> bool:
    return any(text in notice for notice in report.notices)


# --- Random numbers ---


class Noisy(Dense):
    def forward(self, x: torch.Tensor) -> Any:
        h = self.fc(x)
        return {"mean": h, "sample": h + torch.randn_like(h)}


class NoisyDrop(Dense):
    def forward(self, x: torch.Tensor) -> Any:
        return F.dropout(self.fc(x), 0.5, training=True)


class NoisyNnx(DenseNnx):
    """Draws from a generator that it holds, or from a key that it makes."""

    def __init__(self, ours: nn.Module, held: bool) -> None:
        super().__init__(ours)
        self.rngs = nnx.Rngs(noise=1) if held else None

    def __call__(self, x: Any) -> Any:
        h = self.fc(x)
        key = jax.random.key(0) if self.rngs is None else self.rngs.noise()
        return {"mean": h, "sample": h + jax.random.normal(key, h.shape, h.dtype)}


class DropNnx(DenseNnx):
    def __call__(self, x: Any) -> Any:
        h = self.fc(x)
        return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, h.shape), h * 2, 0)


@pytest.mark.parametrize("held", [True, False], ids=["rngs", "key"])
def test_what_does_not_depend_on_noise_is_judged(held: bool) -> None:
    ours = Noisy()
    report = convert.verify(ours, NoisyNnx(ours, held), X, "gradients")
    assert report.verdict == "same"
    assert told(report, "torch and Flax draw random numbers in the forward pass: output.sample ")
    assert told(report, "give the noise to both as an input argument")
    (row,) = [r for r in report.outputs if r.name == "output.sample"]
    assert (row.judged, row.note) == (False, "drawn at random: changes from run to run")
    assert {r.name for r in report.gradients} == {"fc.weight", "fc.bias", "in.x"}

    wrong = NoisyNnx(ours, held)
    wrong.fc.bias[...] += 1
    report = convert.verify(ours, wrong, X)
    assert report.verdict == "different"
    assert report.first_divergence is not None
    assert report.first_divergence.layer == "fc"


def test_where_all_is_noise_nothing_is_the_same() -> None:
    ours = NoisyDrop()
    report = convert.verify(ours, DropNnx(ours), X, "training")
    assert report.verdict == "different"
    found = report.first_divergence
    assert found is not None
    assert found.cause == "random"
    assert found.diagnosis.startswith("torch and Flax draw random numbers")
    assert not report.gradients
    assert not report.training
    wrong = DropNnx(ours)
    wrong.fc.bias[...] += 1
    found = convert.verify(ours, wrong, X).first_divergence
    assert found is not None
    assert (found.layer, found.cause) != ("fc", "random"), "a fault before the noise is still seen"


def test_noise_of_one_side_alone_is_a_difference() -> None:
    ours = Noisy()

    class Still(DenseNnx):
        def __call__(self, x: Any) -> Any:
            h = self.fc(x)
            return {"mean": h, "sample": h}

    report = convert.verify(ours, Still(ours), X)
    assert report.verdict == "different"
    assert report.first_divergence is not None
    assert report.first_divergence.cause == "random"
    assert "torch draws random" in report.first_divergence.diagnosis
    assert [r.name for r in report.outputs if r.judged and not r.same] == ["output.sample"]


def test_dropout_that_is_off_is_no_noise() -> None:
    class Dropping(Dense):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> Any:
            return self.drop(self.fc(x))

    class DroppingNnx(DenseNnx):
        def __init__(self, ours: nn.Module) -> None:
            super().__init__(ours)
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

        def __call__(self, x: Any) -> Any:
            return self.drop(self.fc(x))

    ours = Dropping()
    report = convert.verify(ours, DroppingNnx(ours), X)
    assert (report.verdict, report.notices) == ("same", [])
