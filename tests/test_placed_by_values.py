"""Where torch and Flax part, told by the numbers that both compute, line for line."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import convert
from convert.compare.report import Report
from convert.runtime.jax_values import GIVEN, cotangents_of
from tests.test_right_pairs import ONE_STEP, Torch, arrays, cause
from zoo import probe

X = probe.normal("x", (5, 4)).astype(np.float32)


def linear(p: dict[str, Any], name: str, x: Any) -> Any:
    """A Linear with torch's tensors."""
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def net(forward: Any) -> Torch:
    """Two layers of 4."""
    return Torch(forward, fc=torch.nn.Linear(4, 4), head=torch.nn.Linear(4, 4)).eval()


def line(report: Report) -> str:
    """The line of this file where Flax computes something else."""
    assert report.first_divergence is not None
    assert report.first_divergence.flax_source is not None
    file, _, number = report.first_divergence.flax_source.rpartition(":")
    assert file.endswith("test_placed_by_values.py")
    with open(__file__) as text:
        return text.readlines()[int(number) - 1].strip()


def test_cotangents_of_every_equation() -> None:
    def loss(w: Any, x: Any) -> Any:
        h = jax.nn.relu(x @ w)  # which has a derivative by hand

        def step(carry: Any, row: Any) -> Any:
            return jnp.tanh(carry + row), carry

        last, seen = jax.lax.scan(step, h[0], h)
        return (last * jax.lax.stop_gradient(h).sum(0)).sum() + (seen**2).sum()

    w, x = (jnp.asarray(probe.normal(n, s)) for n, s in (("w", (4, 3)), ("x", (5, 4))))
    with jax.enable_x64(True):
        w, x = (jnp.asarray(np.asarray(a), jnp.float64) for a in (w, x))
        computed, cotangents = cotangents_of(jax.make_jaxpr(loss)(w, x), [w, x])
        wanted = jax.grad(loss, (0, 1))(w, x)
    given = [c for one, c in zip(computed, cotangents, strict=True) if one.primitive == GIVEN]
    for cotangent, right in zip(given, wanted, strict=True):
        np.testing.assert_allclose(cotangent, right, rtol=1e-12)
    tanh = [c for c in computed if c.primitive == "tanh"]
    assert len(tanh) == 5  # one a step
    assert all(c.place is not None and "test_placed" in c.place and "tanh" in c.text for c in tanh)


def test_a_gradient_is_placed_by_the_value_that_it_belongs_to() -> None:
    @jax.custom_vjp
    def bent(h: Any) -> Any:
        return jnp.sin(h)

    bent.defvjp(lambda h: (jnp.sin(h), h), lambda h, g: (jnp.cos(h) * jnp.tanh(g),))

    def ours(self: Any, x: Any) -> Any:
        h = self.fc(x)
        return self.head(torch.sin(h) * h + torch.cos(h))

    def theirs(p: dict[str, Any], x: Any) -> Any:
        h = linear(p, "fc", x)
        return linear(p, "head", bent(h) * h + jnp.cos(h))

    def right(p: dict[str, Any], x: Any) -> Any:
        h = linear(p, "fc", x)
        return linear(p, "head", jnp.sin(h) * h + jnp.cos(h))

    module = net(ours)
    assert convert.verify(module, (right, arrays(module)), X, level="gradients").verdict == "same"
    report = convert.verify(module, (theirs, arrays(module)), X, level="gradients", explain=2)
    assert (report.verdict, cause(report)) == ("different", "unknown")
    assert report.first_divergence is not None
    assert "`torch.sin(h)`" in report.first_divergence.diagnosis
    assert report.first_divergence.layer == ""
    assert report.first_divergence.source is not None


def test_what_nothing_explains_is_told_by_both_lines() -> None:
    def ours(self: Any, x: Any) -> Any:
        h = self.fc(x)
        gate = torch.sigmoid(h) * torch.erf(h)
        return self.head(gate)

    def theirs(p: dict[str, Any], x: Any) -> Any:
        h = linear(p, "fc", x)
        gate = jnp.arctan(h) / (1.3 + jnp.sin(h) ** 2)
        return linear(p, "head", gate)

    module = net(ours)
    report = convert.verify(module, (theirs, arrays(module)), X, explain=2)
    assert report.verdict == "different"
    assert cause(report) == "unknown"
    assert line(report).startswith("gate = jnp.arctan(h)")
    assert report.first_divergence is not None
    assert "`torch.sigmoid(h)`" in report.first_divergence.diagnosis
    assert "jnp.arctan(h)" in report.first_divergence.diagnosis


def test_a_table_of_other_numbers_is_a_constant() -> None:
    def ours(self: Any, x: Any) -> Any:
        table = torch.tensor([0.3, 1.7, 2.9, 3.1], dtype=x.dtype).sqrt()
        return self.head(self.fc(x) * table)

    def theirs(p: dict[str, Any], x: Any) -> Any:
        table = jnp.exp(jnp.arange(4) * 0.37).astype(x.dtype)
        return linear(p, "head", linear(p, "fc", x) * table)

    module = net(ours)
    report = convert.verify(module, (theirs, arrays(module)), X, explain=2)
    assert (report.verdict, cause(report)) == ("different", "constant")


def test_the_gradient_of_a_mask_is_no_verdict() -> None:
    def ours(self: Any, x: Any, m: Any) -> Any:
        return self.head(self.fc(x) * m[:, None])

    def theirs(p: dict[str, Any], x: Any, m: Any) -> Any:
        return linear(p, "head", jnp.where(m[:, None] > 0, linear(p, "fc", x), 0))

    module, mask = net(ours), np.array([1, 0, 1, 1, 0], np.float32)
    inputs = (X, mask)
    report = convert.verify(module, (theirs, arrays(module)), inputs, level="training", **ONE_STEP)
    assert report.verdict == "same"
    (spot,) = (s for s in report.blind_spots if s.kind == "mask gradient")
    assert spot.names == ("1",)
    # A number that is neither makes it an input like any other.
    inputs = (X, mask * np.float32(0.7))
    report = convert.verify(module, (theirs, arrays(module)), inputs, level="gradients")
    assert report.verdict == "different"


def test_what_torch_itself_cannot_train_is_compared_as_far_as_it_can() -> None:
    def ours(self: Any, x: Any) -> Any:
        return torch.sqrt(self.scale * x)

    def theirs(p: dict[str, Any], x: Any) -> Any:
        return jnp.sqrt(p["scale"] * x)

    module = Torch(ours, scale=torch.nn.Parameter(torch.zeros(4)))
    module.scale.data.fill_(1e-4)  # so small that the first step makes some of them negative
    report = convert.verify(
        module, (theirs, {"scale": jnp.full(4, 1e-4)}), np.abs(X), level="training",
        optimizers=["SGD"], steps=4,
    )  # fmt: skip
    (training,) = report.training
    assert training.steps == 1
    assert any("no numbers after" in n for n in report.notices)
    assert report.verdict == "same"


@pytest.mark.parametrize("level", ["outputs", "training"])
def test_a_saved_buffer_matches_what_holds_its_numbers(level: str) -> None:
    def ours(self: Any, x: Any) -> Any:
        return self.head(self.fc(x) - self.centre)

    def theirs(p: dict[str, Any], x: Any) -> Any:
        return linear(p, "head", linear(p, "fc", x) - jax.lax.stop_gradient(p["mean"]))

    module = net(ours)
    module.register_buffer("centre", torch.linspace(0.1, math.pi, 4))
    held = arrays(module)
    held["mean"] = held.pop("centre")
    options = ONE_STEP | {"optimizers": ["AdamW"]} if level == "training" else {}
    report = convert.verify(module, (theirs, held), X, level=level, **options)
    assert report.verdict == "same"
    assert not [s for s in report.blind_spots if s.kind == "no counterpart"]
