"""Torch modules whose code calls functions, as people write them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn


def rotate_half(x: Any) -> Any:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    q_embed = q * cos + rotate_half(q) * sin
    k_embed = k * cos + rotate_half(k) * sin
    return q_embed, k_embed


def repeat_kv(x: Any, n_rep: int) -> Any:
    batch, heads, length, dim = x.shape
    x = x[:, :, None].expand(batch, heads, n_rep, length, dim)
    return x.reshape(batch, heads * n_rep, length, dim)


def scaled(x: Any, by: float) -> Any:
    return torch.tanh(x / by) * by


def shifted(x: Any, kind: str) -> Any:
    if kind == "left":
        return x.roll(-1, 1) * 0.5
    return x.roll(1, 1) * 0.5 + x.mean(1, keepdim=True)


def projected(layer: Any, x: Any) -> Any:
    return layer(x) * 2 + 1


def doubled_in_place(x: Any) -> Any:
    x.mul_(2)
    return x.sum(-1) + 1


class Attention(nn.Module):
    """Grouped attention with rotary positions."""

    def __init__(self, heads: int = 4, groups: int = 2, dim: int = 8) -> None:
        super().__init__()
        self.heads, self.groups, self.dim = heads, groups, dim
        self.n_rep = heads // groups
        self.q = nn.Linear(heads * dim, heads * dim)
        self.k = nn.Linear(heads * dim, groups * dim)
        self.v = nn.Linear(heads * dim, groups * dim)

    def forward(self, x: Any, cos: Any, sin: Any) -> Any:
        B, T, C = x.shape
        q = self.q(x).view(B, T, self.heads, self.dim).transpose(1, 2)
        k = self.k(x).view(B, T, self.groups, self.dim).transpose(1, 2)
        v = self.v(x).view(B, T, self.groups, self.dim).transpose(1, 2)
        q, k = apply_rotary(q, k, cos, sin)
        k = repeat_kv(k, self.n_rep)
        v = repeat_kv(v, self.n_rep)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return y.transpose(1, 2).reshape(B, T, C)


class Rotary(nn.Module):
    """Two layers of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention() for _ in range(2)])

    def forward(self, x: Any, cos: Any, sin: Any) -> Any:
        for layer in self.layers:
            x = x + layer(x, cos, sin)
        return scaled(x, 30.0)


class Odd(nn.Module):
    """Functions that cannot be the port's: they call parts, change what they are given, or do one
    thing here and another there."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Any) -> Any:
        x = projected(self.fc, x)
        x = shifted(x, "left") + shifted(x, "right")
        y = x + 1
        total = doubled_in_place(y)
        return y * total[..., None]


class Sides(nn.Module):
    """One part that is called with arrays of two sizes, each of which it writes down."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)

    def forward(self, query: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        t, s = int(query.shape[1]), int(context.shape[1])
        x = self.fc(query).reshape(-1, t, 3, 2) + self.fc(context).mean(1)[:, None, None, :2]
        return x.reshape(-1, t * 6) / s


class Both(nn.Module):
    """The two sizes one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.side = Sides()

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.side(a, b), self.side(b, a)


class Narrow(nn.Module):
    """A sequence with names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(OrderedDict(fc=nn.Linear(4, 4), act=nn.ReLU()))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.layers(x)  # type: ignore[no-any-return]


class Wide(nn.Module):
    """A sequence with other names, in which the first lies."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(OrderedDict(narrow=Narrow(), head=nn.Linear(4, 4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) * 2  # type: ignore[no-any-return]


class Scaled(nn.Module):
    """What only a call with a mask reads."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(4, 4), scale

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = self.fc(x)
        if mask is not None:
            y = y * mask * self.scale
        return y  # type: ignore[no-any-return]


class Twice(nn.Module):
    """Without a mask first."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Scaled(0.3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.part(self.part(x), mask)  # type: ignore[no-any-return]


class Normed(nn.Module):
    """A position embedding by convolution, as speech models have it."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv1d(8, 8, 4, padding=2, groups=2)
        self.conv = nn.utils.parametrizations.weight_norm(conv, dim=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)[..., :-1]  # type: ignore[no-any-return]


class Ended(nn.Module):
    """A part with an activation, or without."""

    def __init__(self, scale: float, no_relu: bool) -> None:
        super().__init__()
        self.scale, self.fc = scale, nn.Linear(4, 4)
        self.relu = None if no_relu else nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.fc(x) * self.scale + x
        if self.relu is not None:
            out = self.relu(out)
        return out  # type: ignore[no-any-return]


class Chain(nn.Module):
    """The last has none, or the first."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.repeat = nn.Sequential(*(Ended(0.2, not last) for _ in range(3)))
        self.end = Ended(1.0, last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(self.repeat(x))  # type: ignore[no-any-return]


def bucketed(x: torch.Tensor, count: int) -> torch.Tensor:
    """A number that is reckoned of an argument, twice."""
    mid = count // 2
    return torch.where(x.abs() <= mid, x, torch.log(x.abs() / mid) * (mid - 1) + mid)


class Windowed(nn.Module):
    """A part that some have a number for, and others None."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.window = window

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        x = self.fc(x)
        if self.window is not None:
            x = bucketed(x + shift, self.window)
        return x


class Windows(nn.Module):
    """Two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Windowed(window) for window in (600, None))

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, shift)
        return x


class Largest(nn.Module):
    """The largest of neighbours' features."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc, self.norm, self.kind = nn.Linear(8, 6), nn.LayerNorm(6), kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.fc(x)).relu()
        return x.amax(1) if self.kind == "amax" else x.max(dim=1)[0]


class Sized(nn.Module):
    """A part whose code and buffer mention its size, which it has under no name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.register_buffer("filter", torch.full((width,), 0.5), False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        return y / y.norm(dim=-1, keepdim=True).expand_as(y) * self.filter


class Sizes(nn.Module):
    """Two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = Sized(24), Sized(36), nn.Linear(24, 36)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.fc(self.first(x)))


class Tabled(nn.Module):
    """A part with a buffer that nobody saves, a constant of its code, and tiles of a number that
    it has under no name."""

    def __init__(self, width: int, count: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.width, self.fc = width, nn.Linear(width, width)
        self.register_buffer("bias", torch.randn(width, generator=generator), False)
        self.tables = [torch.randn(width, generator=generator), count]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table, count = self.tables
        y = self.fc(x).reshape(-1, count, self.width // count).flip(1).reshape(x.shape)
        return y * table + self.bias


class Tables(nn.Module):
    """Three of them, and a head."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Tabled(24, 4, 0), Tabled(24, 2, 1), Tabled(24, 3, 2)])
        self.head = nn.Linear(24, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)
