"""Two right modules need not be cut alike: where they are not, a fault is still placed."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn
from torch.nn import functional

import convert
from convert.matching.alignment import best_move, moves, to_flax, to_torch
from zoo import probe

Array = Any
C, WIDTH, HEADS, TOKENS = 6, 8, 2, 20


# --- How axes may lie ---


@pytest.mark.parametrize(("shape", "flax"), [
    ((2, 3, 4, 5), lambda x: x.transpose(0, 3, 2, 1)),
    ((2, 1, 4, 5), lambda x: x.transpose(0, 3, 2, 1)),
    ((2, 3, 4, 5), lambda x: x.transpose(0, 2, 3, 1).reshape(2, 20, 3)),
    ((2, 20, 3), lambda x: x.reshape(2, 4, 5, 3)),
    ((2, 3, 20), lambda x: x.transpose(0, 2, 1).reshape(2, 4, 5, 3)),
    ((6, 4), lambda x: x.reshape(2, 3, 4)),
    ((1, 8), lambda x: x.reshape(1, 2, 4)),
])  # fmt: skip
def test_axes_that_are_joined_or_turned_are_found(shape: tuple[int, ...], flax: Any) -> None:
    x = probe.normal("x", shape)
    y = flax(x)
    move = best_move(x, y)
    assert np.array_equal(to_flax(x, move, y.shape), y)
    assert np.array_equal(to_torch(y, move, x.shape), x)


def test_equal_shapes_and_other_sizes_have_no_such_move() -> None:
    assert not moves((2, 6), (3, 5))
    assert not moves((24,), (2, 12))
    assert moves((2, 6, 6), (2, 6, 6))[0] == "same"
    assert not [m for m in moves((2, 3, 4), (2, 3, 4)) if "reshaped" in m]


# --- A vision net: tokens against an image, padding and norms inside against around ---


class Attention(nn.Module):
    """Normalises its own inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (t.view(B, T, HEADS, -1).transpose(1, 2) for t in (q, k, v))
        weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(WIDTH // HEADS), -1)
        return x + self.out((weights @ v).transpose(1, 2).reshape(B, T, WIDTH))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, C, 3, stride=2)
        self.embed = nn.Conv2d(C, WIDTH, 1)
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.conv(functional.pad(x, (0, 1, 0, 1))))
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class FlaxAttention(nnx.Module):
    """Gets normalised inputs, and gives no sum."""

    def __init__(self, fault: str, rngs: nnx.Rngs) -> None:
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.fault = fault

    def __call__(self, x: Array) -> Array:
        q, k, v = (t.reshape(*t.shape[:2], HEADS, -1) for t in jnp.split(self.qkv(x), 3, -1))
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(WIDTH // HEADS)
        weights = jax.nn.softmax(logits, -2 if self.fault == "softmax" else -1)
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))


class FlaxBlock(nnx.Module):
    def __init__(self, fault: str, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.attention = FlaxAttention(fault, rngs)
        self.fault = fault

    def __call__(self, x: Array) -> Array:
        made = self.attention(self.norm(x))
        return made if self.fault == "residual" else x + made


class FlaxNet(nnx.Module):
    def __init__(self, fault: str) -> None:
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, C, (3, 3), strides=2, padding=((0, 1), (0, 1)), rngs=rngs)
        self.embed = nnx.Linear(C, WIDTH, rngs=rngs)
        faults = ("", "softmax") if fault == "second" else (fault, "")
        self.blocks = nnx.List([FlaxBlock(f, rngs) for f in faults])
        self.head = nnx.Linear(WIDTH, 5, rngs=rngs)
        self.fault = fault

    def __call__(self, x: Array) -> Array:
        x = self.embed(jax.nn.relu(self.conv(x)))
        x = x.reshape(len(x), -1, WIDTH)
        for block in self.blocks:
            x = block(x)
        return self.head(x.max(1) if self.fault == "pooled" else x.mean(1))


def pair(fault: str) -> tuple[nn.Module, FlaxNet, np.ndarray, np.ndarray]:
    net = Net().eval()
    for name, p in net.named_parameters():
        p.data = torch.from_numpy(probe.weight(name, tuple(p.shape))).float()
    w = {n: t.numpy() for n, t in net.state_dict().items()}
    other = FlaxNet(fault)

    def put(layer: Any, name: str, kernel: np.ndarray) -> None:
        layer.kernel[...] = kernel
        layer.bias[...] = w[f"{name}.bias"]

    kernel = w["conv.weight"].transpose(2, 3, 1, 0)
    put(other.conv, "conv", kernel[::-1] if fault == "kernel" else kernel)
    put(other.embed, "embed", w["embed.weight"][:, :, 0, 0].T)
    put(other.head, "head", w["head.weight"].T)
    for i, block in enumerate(other.blocks):
        block.norm.scale[...] = w[f"blocks.{i}.norm.weight"]
        block.norm.bias[...] = w[f"blocks.{i}.norm.bias"]
        for part in ("qkv", "out"):
            name = f"blocks.{i}.{part}"
            put(getattr(block.attention, part), name, w[f"{name}.weight"].T)
    x = probe.normal("image", (2, 3, 8, 10)).astype(np.float32)
    return net, other, x, x.transpose(0, 2, 3, 1)


@pytest.mark.parametrize(("fault", "layer", "cause"), [
    ("", None, None),
    ("kernel", "conv", "flipped"),
    ("softmax", "blocks.0", "softmax_axis"),
    ("second", "blocks.1", "softmax_axis"),
    ("residual", "blocks.0", "residual"),
    ("pooled", "", "operation"),
])  # fmt: skip
def test_a_fault_is_placed_behind_borders_that_differ(
    fault: str, layer: str | None, cause: str | None
) -> None:
    net, other, x, flax_x = pair(fault)
    report = convert.verify(net, other, x, flax_inputs=flax_x, level="outputs")
    found = report.first_divergence
    if layer is None:
        assert report.verdict == "same", found
        return
    assert found is not None
    assert (found.layer, found.cause) == (layer, cause), found


def test_a_layer_of_ones_own_that_makes_its_weight_in_forward() -> None:
    """It has what weight_norm has, but no `weight`."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight_g = nn.Parameter(torch.rand(5, 1) + 0.5)
            self.weight_v = nn.Parameter(torch.randn(5, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.weight_g * self.weight_v / self.weight_v.norm(dim=1, keepdim=True)
            return functional.linear(x, weight)

    net = Normed()
    params = {n: jnp.asarray(p.detach().numpy()) for n, p in net.named_parameters()}

    def function(p: dict[str, Array], x: Array) -> Array:
        v = p["weight_v"]
        return x @ (p["weight_g"] * v / jnp.linalg.norm(v, axis=1, keepdims=True)).T

    x = probe.normal("x", (3, 4)).astype(np.float32)
    assert convert.verify(net, (function, params), x, level="gradients").verdict == "same"
