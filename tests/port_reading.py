"""Torch modules whose ports are read: what a line of them is to look like."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class NormAct(nn.BatchNorm2d):
    """A norm with its activation, as timm has it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Any) -> Any:
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training,
            self.momentum, self.eps,
        )  # fmt: skip
        return self.act(x)


class Stem(nn.Module):
    """Two convolutions, each with such a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 3), NormAct(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 6, 3), NormAct(6)
        self.fc = nn.Linear(24, 2)

    def forward(self, x: Any) -> Any:
        x = self.norm1(self.conv1(x))
        x = self.norm2(self.conv2(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 2), 1))


class RmsNorm(nn.Module):
    """In float32 whatever it is given."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.register_buffer("unused", torch.arange(3.0), persistent=False)

    def forward(self, hidden_states: Any) -> Any:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + 1e-6)
        return self.weight * hidden_states.to(input_dtype)


class Rotation(nn.Module):
    """Cosines and sines, without gradients."""

    @torch.no_grad()
    def forward(self, x: Any) -> Any:
        angles = torch.arange(x.shape[1], device=x.device)[:, None] / 10.0
        cos = angles.cos()
        sin = angles.sin()
        return cos, sin


class Layer(nn.Module):
    """Gives a tuple, as layers with attention weights do."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RmsNorm(dim)
        self.fc = nn.Linear(dim, dim)

    def forward(self, x: Any, positions: Any) -> Any:
        cos, sin = positions
        y = self.fc(self.norm(x))
        return (x + y * cos + torch.tanh(y) * sin,)


class Tower(nn.Module):
    """Layers in a loop that hands on the first of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.rotation = Rotation()
        self.layers = nn.ModuleList([Layer(8) for _ in range(3)])

    def forward(self, x: Any) -> Any:
        positions = self.rotation(x)
        hidden = x
        for layer in self.layers:
            outputs = layer(hidden, positions)
            hidden = outputs[0]
        return hidden


class Shared(nn.Module):
    """A part that a block is given by the model that has it too."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = Shift()
        self.blocks = nn.ModuleList([Given(self.bias) for _ in range(2)])

    def forward(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.bias(x)


class Shift(nn.Module):
    """Such a part."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Any) -> Any:
        return torch.tanh(self.fc(x))


class Given(nn.Module):
    """Such a block."""

    def __init__(self, shift: nn.Module) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.shift = shift

    def forward(self, x: Any) -> Any:
        return torch.relu(self.fc(x)) + self.shift(x)
