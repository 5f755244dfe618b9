"""Norms train as the model's own switch makes them: one that is not told to is found."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx

import convert

X = np.random.default_rng(0).standard_normal((12, 5)).astype(np.float32)


class Torch(torch.nn.Module):
    """`frozen` norms stay in eval mode, as in detectors."""

    def __init__(self, *frozen: str) -> None:
        super().__init__()
        self.fc, self.out = torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)
        self.first, self.second = torch.nn.BatchNorm1d(7), torch.nn.BatchNorm1d(7)
        self.frozen = frozen

    def train(self, mode: bool = True) -> Torch:
        super().train(mode)
        for name in self.frozen:
            getattr(self, name).eval()
        return self

    def forward(self, x: Any) -> Any:
        return self.out(self.second(torch.relu(self.first(self.fc(x)))))


class Linen(linen.Module):
    told: tuple[str, ...] = ("first", "second")

    @linen.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = linen.Dense(7, name="fc")(x)
        x = linen.relu(self._norm("first", x, train))
        x = linen.Dropout(0.5, deterministic=not train)(self._norm("second", x, train))
        return linen.Dense(3, name="out")(x)

    def _norm(self, name: str, x: Any, train: bool) -> Any:
        still = not (train and name in self.told)
        return linen.BatchNorm(still, momentum=0.9, epsilon=1e-5, name=name)(x)


class Nnx(nnx.Module):
    def __init__(self, *told: str) -> None:
        rngs = nnx.Rngs(0)
        self.fc, self.out = nnx.Linear(5, 7, rngs=rngs), nnx.Linear(7, 3, rngs=rngs)
        self.first, self.second = (nnx.BatchNorm(7, momentum=0.9, rngs=rngs) for _ in range(2))
        self.told = told

    def __call__(self, x: Any) -> Any:
        x = nnx.relu(self._norm("first", self.fc(x)))
        return self.out(self._norm("second", x))

    def _norm(self, name: str, x: Any) -> Any:
        given = {} if name in self.told else {"use_running_average": True}
        return getattr(self, name)(x, **given)


def net(*frozen: str) -> Torch:
    torch.manual_seed(0)
    made = Torch(*frozen).eval()
    with torch.no_grad():
        for norm in (made.first, made.second):
            for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                assert t is not None
                t.copy_(torch.rand(7) + 0.5)
    return made


def values(of: Torch) -> Any:
    t = {n: jnp.asarray(x.numpy()) for n, x in of.state_dict().items()}
    params: Any = {
        n: {"kernel": t[f"{n}.weight"].T, "bias": t[f"{n}.bias"]} for n in ("fc", "out")
    } | {n: {"scale": t[f"{n}.weight"], "bias": t[f"{n}.bias"]} for n in ("first", "second")}
    moved = {
        n: {"mean": t[f"{n}.running_mean"], "var": t[f"{n}.running_var"]}
        for n in ("first", "second")
    }
    return {"params": params, "batch_stats": moved}


def flax(kind: str, of: Torch, *told: str) -> Any:
    held = values(of)
    if kind == "linen":
        return Linen(told), held
    model: Any = Nnx(*told)
    for n, layer in held["params"].items():
        nnx.update(getattr(model, n), layer)
        nnx.update(getattr(model, n), held["batch_stats"].get(n, {}))
    model.eval()
    return model


def verified(ours: Torch, theirs: Any) -> Any:
    return convert.verify(ours, theirs, X, "training", optimizers=["SGD"], steps=2)


def off(report: Any) -> set[str]:
    return {r.name for r in report.training[0].rows if not r.same}


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_norm_that_is_not_told_to_train_is_found(kind: str) -> None:
    report = verified(ours := net(), flax(kind, ours, "first"))
    assert {"loss", "second.running_mean"} <= off(report)
    found = report.first_divergence
    assert (found.cause, found.layer) == ("batch_statistics", "second")
    assert "second in Flax use running statistics" in found.diagnosis


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.parametrize("told", [(), ("first", "second")])
def test_where_no_norm_is_told_all_train(kind: str, told: tuple[str, ...]) -> None:
    """A port without a switch is no port that trains wrongly; Flax's variance is the biased one."""
    report = verified(ours := net(), flax(kind, ours, *told))
    assert off(report) == {"first.running_var", "second.running_var"}


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_norm_that_torch_freezes_may_be_frozen(kind: str) -> None:
    report = verified(ours := net("first"), flax(kind, ours, "second"))
    assert off(report) == {"second.running_var"}
    assert not ours.training
    report = verified(ours, flax(kind, ours, "first", "second"))
    assert "first.running_mean" in off(report)
    assert report.first_divergence.cause == "batch_statistics"


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_where_torch_freezes_every_norm_none_trains(kind: str) -> None:
    ours = net("first", "second")
    assert verified(ours, flax(kind, ours)).verdict == "same"


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_norm_that_trains_where_torch_freezes_every_one_is_found(kind: str) -> None:
    ours = net("first", "second")
    report = verified(ours, flax(kind, ours, "second"))
    assert "second.running_mean" in off(report)
    assert (report.first_divergence.cause, report.first_divergence.layer) == (
        "batch_statistics",
        "second",
    )
