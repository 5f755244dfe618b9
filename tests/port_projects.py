"""Nets as people have them in their projects, for test_port_projects."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.nn.utils import spectral_norm


class DoubleConv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Any:
        return self.double_conv(x)


class Up(nn.Module):
    """Of an image whose size is odd, one row less comes back: it is padded."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, kernel_size=2, stride=2)
        self.conv = DoubleConv(in_channels, out_channels)

    def forward(self, x1: Tensor, x2: Tensor) -> Any:
        x1 = self.up(x1)
        diff_y = x2.size()[2] - x1.size()[2]
        diff_x = x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [diff_x // 2, diff_x - diff_x // 2, diff_y // 2, diff_y - diff_y // 2])
        x = torch.cat([x2, x1], dim=1)
        return self.conv(x)


class UNet(nn.Module):
    def __init__(self, channels: int = 3, width: int = 4) -> None:
        super().__init__()
        self.inc = DoubleConv(channels, width)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(width, 2 * width))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(2 * width, 4 * width))
        self.up1 = Up(4 * width, 2 * width)
        self.up2 = Up(2 * width, width)

    def forward(self, x: Tensor) -> Any:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x = self.up1(x3, x2)
        return self.up2(x, x1)


class Discriminator(nn.Module):
    """Weights that a hook computes before each call."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(
            spectral_norm(nn.Conv2d(3, 4, 4, 2, 1)),
            nn.LeakyReLU(0.2, inplace=True),
            spectral_norm(nn.Conv2d(4, 8, 4, 2, 1)),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(8, 1, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.main(x)
        return made.view(-1, 1).squeeze(1)


class ConvBlock(nn.Module):
    def __init__(self, cin: int, cout: int, pool: tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, 3, padding=1)
        self.pool = nn.MaxPool2d(pool)

    def forward(self, x: Tensor) -> Any:
        return self.pool(torch.relu(self.conv(x)))


class Tagger(nn.Module):
    """Blocks that differ in their pools, and a pool for all of them."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([ConvBlock(1, 4, (2, 1)), ConvBlock(4, 8, (4, 2))])
        self.smaller = nn.AvgPool2d(2)
        self.also = nn.ModuleList([self.smaller])
        self.head = nn.Linear(8, classes)

    def forward(self, spec: Tensor) -> Any:
        x = spec
        for block in self.blocks:
            x = block(x)
        x = self.also[0](self.smaller(x))
        return self.head(x.mean((2, 3)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x[..., ::2], x[..., 1::2]
    return torch.stack((x1 * cos - x2 * sin, x1 * sin + x2 * cos), -1).flatten(-2)


class Attention(nn.Module):
    """Grouped heads, of which a function is given both kinds."""

    def __init__(self, dim: int, n_heads: int, n_kv: int) -> None:
        super().__init__()
        self.n_heads, self.n_kv, self.head_dim = n_heads, n_kv, dim // n_heads
        self.wq = nn.Linear(dim, n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv * self.head_dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x.shape
        q = self.wq(x).view(B, T, self.n_heads, self.head_dim).transpose(1, 2)
        k = self.wk(x).view(B, T, self.n_kv, self.head_dim).transpose(1, 2)
        v = self.wv(x).view(B, T, self.n_kv, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k = k.repeat_interleave(self.n_heads // self.n_kv, dim=1)
        v = v.repeat_interleave(self.n_heads // self.n_kv, dim=1)
        att = (q @ k.transpose(-2, -1)) / math.sqrt(self.head_dim)
        y = F.softmax(att, dim=-1) @ v
        return y.transpose(1, 2).contiguous().view(B, T, -1)


class Decoder(nn.Module):
    def __init__(self, dim: int = 16, max_len: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(dim, 4, 2) for _ in range(2))
        t = torch.outer(torch.arange(max_len).float(), torch.tensor([1.0, 0.01]))
        self.register_buffer("cos", torch.cos(t), persistent=False)
        self.register_buffer("sin", torch.sin(t), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:T], self.sin[:T])
        return x
