"""What public ports of others taught (docs/ports.md), each as a tiny pair of our own."""

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
from convert.compare.report import Report

X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


def array(t: torch.Tensor) -> jax.Array:
    return jnp.asarray(t.detach().numpy())


def dense(layer: nn.Linear) -> dict[str, jax.Array]:
    return {"kernel": array(layer.weight.T), "bias": array(layer.bias)}


def norm(layer: nn.BatchNorm1d) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    params = {"scale": array(layer.weight), "bias": array(layer.bias)}
    return params, {"mean": array(layer.running_mean), "var": array(layer.running_var)}


def pairs(report: Report) -> list[str]:
    return [row.name for row in report.layers]


# --- Modes that a module tells by what it may change, or asks for ---


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bn = nn.BatchNorm1d(4)
        with torch.no_grad():
            for t in (self.bn.weight, self.bn.bias, self.bn.running_mean, self.bn.running_var):
                t.copy_(torch.rand(4) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(x)


class ByWhatMayChange(linen.Module):
    """Trains where its statistics may be changed, as some public ports do."""

    epsilon: float = 1e-5

    @linen.compact
    def __call__(self, x: Any) -> Any:
        trains = self.is_mutable_collection("batch_stats")
        layer = linen.BatchNorm(use_running_average=not trains, epsilon=self.epsilon, name="bn")
        return layer(x)


class AlwaysTrains(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        return linen.BatchNorm(use_running_average=False, name="bn")(x)


def bound(module: linen.Module, ours: Normed) -> Any:
    params, stats = norm(ours.bn)
    return module, {"params": {"bn": params}, "batch_stats": {"bn": stats}}


def test_a_module_that_tells_its_mode_by_what_may_change_is_evaluated() -> None:
    ours = Normed()
    assert convert.verify(ours, bound(ByWhatMayChange(), ours), X).verdict == "same"
    report = convert.verify(ours, bound(ByWhatMayChange(epsilon=1e-3), ours), X)
    assert report.first_divergence is not None
    assert report.first_divergence.cause == "epsilon"


def test_statistics_that_move_in_evaluation_are_still_named() -> None:
    ours = Normed()
    report = convert.verify(ours, bound(AlwaysTrains(), ours), X)
    assert report.first_divergence is not None
    assert report.first_divergence.cause == "batch_statistics"


class Asked(linen.Module):
    """Its norm is told its mode by the call, which is replayed with all arguments by position."""

    @linen.compact
    def __call__(self, x: Any, deterministic: bool = True) -> Any:
        layer = linen.BatchNorm(momentum=0.9, epsilon=1e-5, name="bn")
        return layer(x, use_running_average=deterministic)


def test_a_norm_that_is_told_its_mode_by_position_is_run_in_training() -> None:
    ours = Normed()
    report = convert.verify(ours, bound(Asked(), ours), X, level="training")
    assert report.first_divergence is not None
    assert report.first_divergence.cause == "unbiased_variance"


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class AsksForKeys(nnx.Module):
    """Its call has keys for dropout and no default for them."""

    def __init__(self, ours: Plain) -> None:
        self.fc = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5)
        for name, value in dense(ours.fc).items():
            getattr(self.fc, name)[...] = value

    def __call__(self, x: Any, *, rngs: nnx.Rngs | None) -> Any:
        return self.dropout(self.fc(x), rngs=rngs)


def test_keys_that_a_call_asks_for_are_none_in_evaluation() -> None:
    ours = Plain()
    report = convert.verify(ours, AsksForKeys(ours), X)
    assert all(row.same for row in report.outputs)
    assert any("rngs=None" in notice for notice in report.notices)


# --- Layers in another order or another container ---


class Projections(nn.Module):
    """Key before query, and a norm beside the block that it belongs to in Flax."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = Plain()
        self.k_proj, self.q_proj = nn.Linear(4, 1), nn.Linear(4, 4)
        self.bn = Normed().bn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.block(x))
        k, q = self.k_proj(x), self.q_proj(x)
        return q * torch.sigmoid(k)


class Block(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        x = linen.Dense(4, name="dense")(x)
        return linen.BatchNorm(use_running_average=True, momentum=0.9, epsilon=1e-5, name="norm")(x)


class ProjectionsLinen(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        x = Block(name="stem")(x)
        q, k = linen.Dense(4, name="query")(x), linen.Dense(1, name="key")(x)
        return q * jax.nn.sigmoid(k)


def test_layers_called_in_another_order_or_container_are_paired_by_what_they_hold() -> None:
    ours = Projections().eval()
    scale, stats = norm(ours.bn)
    params = {
        "stem": {"dense": dense(ours.block.fc), "norm": scale},
        "query": dense(ours.q_proj),
        "key": dense(ours.k_proj),
    }
    given = ProjectionsLinen(), {"params": params, "batch_stats": {"stem": {"norm": stats}}}
    report = convert.verify(ours, given, X)
    assert report.verdict == "same"
    assert not report.blind_spots
    assert {"bn", "q_proj", "k_proj"} <= set(pairs(report))


# --- Buffers that torch's code makes ---


class Positions(nn.Module):
    def __init__(self, saved: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 4)
        self.register_buffer("steps", torch.arange(5.0)[:, None], persistent=saved)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x + self.steps)


class PositionsNnx(nnx.Module):
    def __init__(self, ours: Positions) -> None:
        self.fc = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        for name, value in dense(ours.fc).items():
            getattr(self.fc, name)[...] = value

    def __call__(self, x: Any) -> Any:
        return self.fc(x + jnp.arange(5.0)[:, None])


@pytest.mark.parametrize("saved", [False, True])
def test_a_buffer_that_is_not_saved_needs_no_counterpart(saved: bool) -> None:
    ours = Positions(saved)
    report = convert.verify(ours, PositionsNnx(ours), X)
    assert report.verdict == "same"
    assert [b.kind for b in report.blind_spots] == (["no counterpart"] if saved else [])
