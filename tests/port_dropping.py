"""Torch modules of the tests of `convert.port` that drop without layers of torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class DropPath(nn.Module):
    """Whole samples are dropped."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.drop_prob = p

    def forward(self, x: Any) -> Any:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        return x.div(keep) * (keep + torch.rand(shape)).floor_()


class Attention(nn.Module):
    """Drops weights inside of torch's function, and what it gives."""

    def __init__(self, d: int, p: float) -> None:
        super().__init__()
        self.qkv = nn.Linear(d, 3 * d)
        self.resid_drop = nn.Dropout(0.3)
        self.attn_pdrop = p

    def forward(self, x: Any) -> Any:
        q, k, v = self.qkv(x).chunk(3, -1)
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.attn_pdrop if self.training else 0.0
        )
        return F.dropout(y, self.resid_drop.p, self.training)


class Dropping(nn.Module):
    """Blocks with other rates; the first drops no path."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Attention(8, p) for p in (0.1, 0.2)])
        self.first, self.second = _Residual(8, 0.0), _Residual(8, 0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        for part in self.parts:
            x = x + part(x)
        x = self.second(self.first(x))
        return self.head(F.dropout(x, 0.25, training=self.training))


class _Residual(nn.Module):
    def __init__(self, d: int, p: float) -> None:
        super().__init__()
        self.fc = nn.Linear(d, d)
        self.drop_path = DropPath(p) if p else nn.Identity()

    def forward(self, x: Any) -> Any:
        return x + self.drop_path(torch.tanh(self.fc(x)))
