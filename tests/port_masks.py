"""Modules whose masks are index arithmetic, for test_port_masks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Rule = Callable[[Tensor, Tensor], Tensor]


def causal(q: Tensor, k: Tensor) -> Tensor:
    return k <= q


def window(q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & (k > q - 3)


def wide(q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & (k > q - 40)


def widest(q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & (k > q - 4096)


def blocks(q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & (q // 64 - k // 64 < 64)


def everything(q: Tensor, k: Tensor) -> Tensor:
    return q >= 0


def earlier(q: Tensor, k: Tensor) -> Tensor:
    return k < q + 2


def mask_of(x: Tensor, rule: Rule) -> Tensor:
    """As a library makes it for all its models: (B, 1, T, T) of ranges, and never elegantly."""
    batch, length = x.shape[0], x.shape[1]
    positions = torch.arange(length)
    q, k = positions[None, None, :, None], positions[None, None, None, :]
    mask = rule(q, k) & torch.ones(1, 1, 1, 1, dtype=torch.bool)
    return mask.expand(batch, 1, length, length)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.scaling = (dim // heads) ** -0.5

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scaling)
        return out.transpose(1, 2).reshape(B, T, C)


class Masked(nn.Module):
    """Two layers that are given one mask."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.layers = nn.ModuleList([Attention(12, 2) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        mask = mask_of(x, self.rule)
        for layer in self.layers:
            x = x + layer(x, mask)
        return x


class Dropping(nn.Module):
    """Attention whose weights are dropped in training."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.q = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        rate = 0.1 if self.training else 0.0
        q = self.q(x)[:, None]
        return F.scaled_dot_product_attention(q, q, q, mask_of(x, self.rule), dropout_p=rate)


class Added(nn.Module):
    """A mask that is added to the scores."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.q = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        seen = mask_of(x, self.rule)[:, 0]
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        scores = self.q(x) @ x.transpose(1, 2) + mask
        return scores.softmax(-1) @ x


class Filled(nn.Module):
    """Scores that are filled where nothing is to be seen."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ x.transpose(1, 2)
        scores = scores.masked_fill(~mask_of(x, self.rule)[:, 0], -torch.inf)
        return scores.softmax(-1) @ x


class Crossed(nn.Module):
    """A mask of as many rows as one array has steps, and as many columns as another."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k = torch.arange(x.shape[1])[:, None], torch.arange(y.shape[1])[None]
        seen = ((q >= k) & (q >= 0) & (k >= 0)).expand(x.shape[0], 1, x.shape[1], y.shape[1])
        return F.scaled_dot_product_attention(x[:, None], y[:, None], y[:, None], seen)


class Short(nn.Module):
    """A mask that reads well as it is."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.tril(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool))
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], mask)


class Heads(nn.Module):
    """Heads that are moved before steps and back."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], 2, 4)
        queries = self.q(x).view(shape).transpose(1, 2)
        keys = self.k(x).view(shape).transpose(1, 2)
        values = self.v(x).view(shape).transpose(1, 2)
        out = F.scaled_dot_product_attention(queries, keys, values)
        out = out.transpose(1, 2)
        return out.reshape(x.shape)
