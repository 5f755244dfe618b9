"""One small net three times, as users write them: torch, NNX and Linen."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx
from torch import nn

from zoo import probe

SHAPE = (3, 3, 6, 8)  # NCHW


class TorchNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.fc(self.drop(self.norm(x)))


class Norm(nnx.BatchNorm):
    """nnx.BatchNorm with torch's unbiased running variance."""

    def __call__(self, x: Any, **kw: Any) -> Any:
        before = self.var[...]
        y = super().__call__(x, **kw)
        if not self.use_running_average:
            n = x.size // x.shape[-1]
            moved = (self.var[...] - self.momentum * before) * n / (n - 1)
            self.var[...] = self.momentum * before + jax.lax.stop_gradient(moved)
        return y


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, eps: float = 1e-5, torch_norm: bool = True) -> None:
        kw: dict[str, Any] = {"epsilon": 1e-5, "use_fast_variance": False, "rngs": rngs}
        self.conv = nnx.Conv(3, 4, (3, 3), padding=1, rngs=rngs)
        self.bn = (Norm if torch_norm else nnx.BatchNorm)(4, momentum=0.9, **kw)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.LayerNorm(4, **(kw | {"epsilon": eps}))
        self.fc = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.bn(self.conv(x))).mean((1, 2))
        return self.fc(self.drop(self.norm(x)))


class LinenNet(linen.Module):
    eps: float = 1e-5
    dtype: Any = None

    @linen.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = linen.Conv(4, (3, 3), padding=1, name="conv", dtype=self.dtype)(x)
        x = linen.BatchNorm(not train, momentum=0.9, use_fast_variance=False, name="bn")(x)
        x = jax.nn.relu(x).mean((1, 2))
        x = linen.LayerNorm(self.eps, use_fast_variance=False, name="norm")(x)
        return linen.Dense(5, name="fc")(linen.Dropout(0.5, deterministic=not train)(x))


def torch_net() -> TorchNet:
    """With weights that follow from their names."""
    net = TorchNet()
    state = {
        n: torch.from_numpy(probe.weight(n, tuple(t.shape)))
        for n, t in net.state_dict().items()
        if t.is_floating_point()
    }
    net.load_state_dict(state, strict=False)
    return net


def values() -> dict[str, dict[str, Any]]:
    """The same weights as Flax has them: layer -> leaf -> array."""
    state = {n: jnp.asarray(t.detach().numpy()) for n, t in torch_net().state_dict().items()}
    return {
        "conv": {"kernel": state["conv.weight"].transpose(2, 3, 1, 0), "bias": state["conv.bias"]},
        "bn": {"scale": state["bn.weight"], "bias": state["bn.bias"]},
        "norm": {"scale": state["norm.weight"], "bias": state["norm.bias"]},
        "fc": {"kernel": state["fc.weight"].T, "bias": state["fc.bias"]},
        "statistics": {"mean": state["bn.running_mean"], "var": state["bn.running_var"]},
    }


def nnx_net(eps: float = 1e-5, torch_norm: bool = True) -> NnxNet:
    net = NnxNet(nnx.Rngs(0), eps, torch_norm)
    held = values()
    held["bn"] |= held.pop("statistics")
    for layer, leaves in held.items():
        for leaf, value in leaves.items():
            getattr(getattr(net, layer), leaf)[...] = value
    return net


def linen_net(eps: float = 1e-5, dtype: Any = None) -> tuple[LinenNet, dict[str, Any]]:
    held = values()
    statistics = {"bn": held.pop("statistics")}
    return LinenNet(eps, dtype), {"params": held, "batch_stats": statistics}


def images() -> np.ndarray:
    return probe.normal("images", SHAPE).astype(np.float32)
