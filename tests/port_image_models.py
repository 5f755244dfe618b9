"""Torch modules with images, for the tests of `convert.port`, written as people write them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Down(nn.Module):
    """Two convolutions."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(i, o, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(2, o)
        self.act = nn.PReLU(o)

    def forward(self, x: Any) -> Any:
        return self.act(self.norm(self.conv(x)))


class UNet(nn.Module):
    """Skips, pads and resizing; the normalisation of the images is of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        std = torch.tensor([0.2, 0.3, 0.2]).view(3, 1, 1)
        self.register_buffer("std", std, persistent=False)
        self.d1 = Down(3, 4)
        self.d2 = Down(4, 6)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.u1 = Down(8, 4)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Any) -> Any:
        x = (x - self.mean) / self.std
        a = self.d1(x)
        b = self.d2(F.max_pool2d(a, 2))
        u = F.pad(self.up(b), (1, 0, 0, 2), mode="constant")
        u = F.interpolate(u, size=a.shape[2:], mode="bilinear", align_corners=False)
        u = self.u1(torch.cat([a, u], dim=1))
        return self.out(u).softmax(1)


class LayerNorm2d(nn.LayerNorm):
    """Of channels, as everybody writes it."""

    def forward(self, x: Any) -> Any:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Scaled(nn.Module):
    """A block with a scale for each channel."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.dw = nn.Conv2d(d, d, 3, padding=1, groups=d)
        self.norm = LayerNorm2d(d)
        self.gamma = nn.Parameter(torch.arange(1.0, d + 1)[:, None, None] / d)

    def forward(self, x: Any) -> Any:
        return x + self.gamma * F.gelu(self.norm(self.dw(x)))


class NormAct(nn.BatchNorm2d):
    """A norm with its activation, as timm has it."""

    def forward(self, x: Any) -> Any:
        training = self.training or not self.track_running_stats
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training, 0.1, self.eps
        )
        return F.silu(x)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.fc = nn.Linear(d, d)

    def forward(self, x: Any) -> Any:
        b, c, _, _ = x.size()
        y = F.adaptive_avg_pool2d(x, 1).view(b, c)
        return x * torch.sigmoid(self.fc(y)).view(b, c, 1, 1)


class Classifier(nn.Module):
    """Features that are flattened where they are still images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2, stride=2)
        self.norm = NormAct(4)
        self.blocks = nn.ModuleList([Scaled(4) for _ in range(2)])
        self.gate = Gate(4)
        self.fc = nn.Linear(4 * 4 * 4, 5)

    def forward(self, x: Any) -> Any:
        x = self.norm(self.stem(x))
        for block in self.blocks:
            x = block(x)
        x = self.gate(x)
        x = F.max_pool2d(x, 2)
        x = x.view(x.size(0), -1)
        return self.fc(x)


class Tokens(nn.Module):
    """Patches as tokens, and tokens as an image again."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.LayerNorm(8)
        self.local = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Any) -> Any:
        x = self.patch(x)
        B, C, H, W = x.shape
        x = self.norm(x.flatten(2).transpose(1, 2))
        return self.local(x.transpose(1, 2).reshape(B, C, H, W))


class Crnn(nn.Module):
    """Columns of an image as a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.rnn = nn.GRU(4 * 4, 6, batch_first=True)

    def forward(self, x: Any) -> Any:
        x = F.relu(self.conv(x))
        b, c, h, w = x.size()
        x = x.permute(0, 3, 1, 2).reshape(b, w, c * h)
        return self.rnn(x)[0]


class Shuffled(nn.Module):
    """Channels in groups, and the positions of an image attending to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 1)

    def forward(self, x: Any) -> Any:
        x = self.conv(x)
        b, c, h, w = x.size()
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        x = torch.flip(x, [3])[:, 1:].amax(dim=1, keepdim=True) + x
        flat = x.view(b, c, h * w)
        return torch.bmm(flat, flat.permute(0, 2, 1))


class Frames(nn.Module):
    """A video by its frames, and its sound."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.sound = nn.Conv1d(1, 4, 5, stride=2)

    def forward(self, x: Any, wave: Any) -> Any:
        b, t, c, h, w = x.shape
        seen = self.conv(x.view(b * t, c, h, w)).mean([2, 3]).view(b, t, -1)
        heard = self.sound(wave.unsqueeze(1)).transpose(1, 2)
        return torch.cat([seen, heard], dim=1)


class Mean(nn.Module):
    """Over what torch has as axis 1."""

    def forward(self, x: Any) -> Any:
        return x.mean(1, keepdim=True)


class Shared(nn.Module):
    """One part for an image and for what is none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.mean = Mean()

    def forward(self, x: Any) -> Any:
        return self.mean(self.conv(x)).mean() + self.mean(x @ x.mT).mean()


class Unbatched(nn.Module):
    """An image without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Any) -> Any:
        return self.conv(x[0])
