"""Torch modules whose constructors take sizes, from which others follow."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Any) -> Any:
        return self.down(torch.relu(self.up(x)))


class Block(nn.Module):
    """Every size is an argument, or follows from some."""

    def __init__(self, dim: int, heads: int, ratio: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.mlp = Mlp(dim, ratio * dim)
        self.gamma = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x: Any) -> Any:
        B, T, C = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, T, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1) @ v
        x = x + self.gamma * self.proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp(x)


class Stack(nn.Module):
    def __init__(self, dim: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(2)])

    def forward(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return x


class Fixed(nn.Module):
    """A size that the code states, and one that does not grow in proportion."""

    def __init__(self, dim: int = 12, steps: int = 5) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, 6)
        self.bins = nn.Linear(6, 2 * steps + 1)

    def forward(self, x: Any) -> Any:
        return self.bins(self.inner(x.reshape(x.shape[0], -1, 12)))
