"""Norms of somebody's own that keep statistics: matched, trained and blamed as NNX's are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import convert

X = np.random.default_rng(0).standard_normal((12, 5)).astype(np.float32)


class Ghost(torch.nn.Module):
    """Batches of six are normalised apart in training."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = torch.nn.BatchNorm1d(7)

    def forward(self, x: Any) -> Any:
        if not self.training:
            return self.bn(x)
        return torch.cat([self.bn(part) for part in x.split(6, 0)], 0)


class Torch(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.out = torch.nn.Linear(5, 7), Ghost(), torch.nn.Linear(7, 3)

    def forward(self, x: Any) -> Any:
        return self.out(torch.relu(self.norm(self.fc(x))))


class Norm(nnx.Module):
    def __init__(self, size: int, mode: str, kept: str, decay: float) -> None:
        self.gamma, self.beta = nnx.Param(jnp.ones(size)), nnx.Param(jnp.zeros(size))
        self.mu, self.sigma2 = nnx.BatchStat(jnp.zeros(size)), nnx.BatchStat(jnp.ones(size))
        self.mode, self.kept, self.decay = mode, kept, decay
        setattr(self, mode, mode == "training")

    def __call__(self, x: Any) -> Any:
        if getattr(self, self.mode) != (self.mode == "training"):
            return self.applied(x, self.mu[...], self.sigma2[...])
        made = []
        for start in range(0, x.shape[0], 6):
            part = x[start : start + 6]
            mean, var, n = part.mean(0), part.var(0), part.shape[0]
            new = mean, var * n / (n - 1) if self.kept == "unbiased" else var
            for old, value in zip((self.mu, self.sigma2), new, strict=True):
                stopped = jax.lax.stop_gradient(value)
                old[...] = self.decay * old[...] + (1 - self.decay) * stopped
            made.append(self.applied(part, mean, var))
        return jnp.concatenate(made)

    def applied(self, x: Any, mean: Any, var: Any) -> Any:
        return (x - mean) / jnp.sqrt(var + 1e-5) * self.gamma[...] + self.beta[...]


class Flax(nnx.Module):
    def __init__(self, mode: str, kept: str, decay: float) -> None:
        rngs = nnx.Rngs(0)
        self.first, self.last = nnx.Linear(5, 7, rngs=rngs), nnx.Linear(7, 3, rngs=rngs)
        self.between = Norm(7, mode, kept, decay)

    def __call__(self, x: Any) -> Any:
        return self.last(nnx.relu(self.between(self.first(x))))


def pair(mode: str = "use_running_average", kept: str = "unbiased", decay: float = 0.9) -> Any:
    torch.manual_seed(0)
    net, model = Torch(), Flax(mode, kept, decay)
    with torch.no_grad():
        for t in (*net.norm.bn.parameters(), *net.norm.bn.buffers()):
            if t.is_floating_point():
                t.uniform_(0.5, 1.5)
    bn, norm = net.norm.bn, model.between
    for theirs, ours in (
        (norm.gamma, bn.weight),
        (norm.beta, bn.bias),
        (norm.mu, bn.running_mean),
        (norm.sigma2, bn.running_var),
        (model.first.bias, net.fc.bias),
        (model.last.bias, net.out.bias),
    ):
        theirs[...] = jnp.asarray(ours.detach().numpy())
    model.first.kernel[...] = jnp.asarray(net.fc.weight.detach().numpy().T)
    model.last.kernel[...] = jnp.asarray(net.out.weight.detach().numpy().T)
    setattr(norm, mode, mode != "training")  # eval mode
    return net.eval(), model


@pytest.mark.parametrize("mode", ["use_running_average", "training"])
def test_they_are_the_same_in_training(mode: str) -> None:
    report = convert.verify(*pair(mode), X, level="training")
    assert report.verdict == "same", str(report)
    assert not report.blind_spots


@pytest.mark.parametrize(
    ("change", "cause"),
    [({"kept": "biased"}, "unbiased_variance"), ({"decay": 0.1}, "momentum")],
)
def test_their_faults_are_named(change: dict[str, Any], cause: str) -> None:
    report = convert.verify(*pair(**change), X[:6], level="training")
    found = report.first_divergence
    assert (found.cause, found.layer) == (cause, "norm.bn"), found.diagnosis


class Table(torch.nn.Module):
    """Frequencies that nobody saves, rounded to float32."""

    def __init__(self) -> None:
        super().__init__()
        made = torch.arange(1, 6) * torch.pi / 2.6
        self.register_buffer("frequencies", made, persistent=False)
        self.out = torch.nn.Linear(5, 3)

    def forward(self, x: Any) -> Any:
        return self.out(torch.sin(x * self.frequencies))


def test_a_table_that_nobody_saves_may_be_computed_in_more_digits() -> None:
    torch.manual_seed(0)
    net, out = Table().eval(), nnx.Linear(5, 3, rngs=nnx.Rngs(0))
    out.kernel[...] = jnp.asarray(net.out.weight.detach().numpy().T)
    out.bias[...] = jnp.asarray(net.out.bias.detach().numpy())

    class Computed(nnx.Module):
        def __init__(self, width: float) -> None:
            self.out, self.width = out, width

        def __call__(self, x: Any) -> Any:
            return self.out(jnp.sin(x * jnp.arange(1, 6) * jnp.pi / self.width))

    assert convert.verify(net, Computed(2.6), X, level="gradients").verdict == "same"
    assert convert.verify(net, Computed(2.6001), X, level="gradients").verdict == "different"


def test_of_different_tensors_one_that_is_explained_comes_first() -> None:
    net, model = pair()
    model.last.kernel[...] = model.last.kernel[...] * 2
    model.between.beta[...] = model.between.beta[...] + jnp.arange(7.0)
    found = convert.verify(net, model, X, level="bits").first_divergence
    assert (found.cause, found.tensor) == ("scale", "out.weight")
