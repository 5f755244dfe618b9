"""Torch modules of the tests of `convert.port`, written as people write them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """Causal attention with a mask that is a buffer."""

    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        self.n_head = h
        self.ln_1 = nn.LayerNorm(d)
        self.c_attn = nn.Linear(d, 3 * d)
        self.c_proj = nn.Linear(d, d)
        self.drop = nn.Dropout(0.1)
        mask = torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16)
        self.register_buffer("bias", mask, persistent=False)

    def forward(self, x: Any) -> Any:
        y = self.ln_1(x)
        B, T, C = y.size()
        q, k, v = self.c_attn(y).split(C, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / k.size(-1) ** 0.5)
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = torch.softmax(att, dim=-1)
        y = att @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return x + self.drop(self.c_proj(y))


class Decoder(nn.Module):
    """Two blocks, the head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(50, 32)
        self.h = nn.ModuleList([Block(32, 4) for _ in range(2)])
        self.f = nn.LayerNorm(32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, idx: Any) -> Any:
        _, t = idx.size()
        pos = torch.arange(0, t, dtype=torch.long, device=idx.device)
        x = self.emb(idx) + self.emb(pos)
        for block in self.h:
            x = block(x)
        x = self.f(x)
        return self.head(x)


class Basic(nn.Module):
    """A residual block, whose input is projected where its size changes."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or inplanes != planes:
            self.downsample = nn.Conv2d(inplanes, planes, 1, stride, bias=False)

    def forward(self, x: Any) -> Any:
        identity = x
        out = self.bn1(self.conv1(x))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Stages(nn.Module):
    """Two stages of residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Basic(8, 8), Basic(8, 8))
        self.layer2 = nn.Sequential(Basic(8, 16, 2), Basic(16, 16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Any) -> Any:
        return self._impl(x)

    def _impl(self, x: Any) -> Any:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer1(x)
        x = self.layer2(x)
        return self.fc(x.mean((2, 3)))


class Pooled(nn.Module):
    """A convolution, its norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Any) -> Any:
        return self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))


class Residual(nn.Module):
    """As small as it goes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        return x + F.gelu(self.fc(x))


class OnlyInTraining(Residual):
    """Noise, in train mode."""

    def forward(self, x: Any) -> Any:
        return self.fc(x) + (torch.randn_like(x) if self.training else 0)


class OneIsOther(Residual):
    """Does something else for a batch of one."""

    def forward(self, x: Any) -> Any:
        return self.fc(x) * 2 if x.shape[0] > 1 else x


class Lstm(nn.Module):
    """Output and state of a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3, batch_first=True)
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Any) -> Any:
        x, (h, _) = self.lstm(x)
        return self.fc(x.mean(1) + h[-1])


class Gru(nn.Module):
    """The state alone."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 3, batch_first=True)

    def forward(self, x: Any) -> Any:
        _, h = self.gru(x)
        return h[-1]


class NewZeros(Residual):
    """Makes a tensor of the dtype of its input."""

    def forward(self, x: Any) -> Any:
        held = x.new_zeros(x.shape[0], 4)
        return held.index_add(0, torch.tensor([1]), x[:1, 0]) + self.fc(x[:, 0])


class Draws(nn.Module):
    """Draws in eval mode too, as a VAE does."""

    def __init__(self) -> None:
        super().__init__()
        self.mu = nn.Linear(4, 3)
        self.logvar = nn.Linear(4, 3)
        self.out = nn.Linear(3, 4)

    def reparameterize(self, mu: Any, logvar: Any) -> Any:
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return mu + eps * std

    def forward(self, x: Any) -> Any:
        mu, logvar = self.mu(x), self.logvar(x)
        z = self.reparameterize(mu, logvar)
        z = z + 0.1 * torch.rand(x.shape[0], 3)
        return self.out(z), mu, logvar


class Throws(Residual):
    """Draws by what nobody can draw alike."""

    def forward(self, x: Any) -> Any:
        return self.fc(x) * torch.bernoulli(torch.full_like(x, 0.5))


class Attending(nn.Module):
    """Attention over itself or over another, with a mask or without."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.kv = nn.Linear(8, 16)

    def forward(self, x: Any, context: Any = None, mask: Any = None) -> Any:
        source = x if context is None else context
        k, v = self.kv(source).chunk(2, -1)
        scores = self.q(x) @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        return torch.softmax(scores, -1) @ v


class Reader(nn.Module):
    """Holds an embedding of somebody else."""

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self.embedding = embedding
        self.attend = Attending()
        self.cross = Attending()

    def forward(self, ids: Any, memory: Any, mask: Any) -> Any:
        x = self.embedding(ids)
        x = x + self.attend(x, mask=mask)
        return x + self.cross(x, memory)


class Translator(nn.Module):
    """One embedding in two parts, and one part that is called with and without its argument."""

    def __init__(self) -> None:
        super().__init__()
        embedding = nn.Embedding(20, 8)
        self.encoder = Reader(embedding)
        self.decoder = Reader(embedding)
        self.last = Attending()

    def forward(self, source: Any, target: Any) -> Any:
        mask = (source != 0)[:, None, :]
        memory = self.encoder(source, self.encoder.embedding(source), mask)
        length = target.shape[1]
        causal = torch.tril(torch.ones(length, length)).bool()
        x = self.decoder(target, memory, causal)
        return self.last(self.last(x), memory)


class Masked(Residual):
    """A result whose size depends on values."""

    def forward(self, x: Any) -> Any:
        y = self.fc(x)
        return y[y > 0]


class Act(nn.Module):
    """An activation of one's own."""

    def forward(self, x: Any) -> Any:
        return 0.5 * x * (1 + torch.tanh(x))


ACT = Act()


class Activated(nn.Module):
    """Parts that share an activation, and are called otherwise by a word."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Spoken()
        self.second = Spoken()

    def forward(self, x: Any) -> Any:
        return self.second(self.first(x, "plain"), "plain") + self.first(x, "squared")


class Spoken(nn.Module):
    """Does what it is told; only some have a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.act = ACT

    def forward(self, x: Any, kind: str) -> Any:
        x = self.act(self.fc(x))
        if kind == "squared":
            x = x * x
        return x


class Temporal(nn.Module):
    """Parts under two names, and one of them twice in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.drop = nn.Dropout(0.2)
        self.net = nn.Sequential(self.conv, nn.ReLU(), self.drop, self.conv)
        self.twice = Residual()
        self.years = nn.ModuleList([self.twice, Residual(), self.twice])

    def forward(self, x: Any) -> Any:
        x = self.net(x.transpose(1, 2)).transpose(1, 2)
        for year in self.years:
            x = year(x)
        return x


class NoisyLinear(nn.Linear):
    """torch's layer in eval mode, and another in train mode."""

    def forward(self, x: Any) -> Any:
        y = F.linear(x, self.weight, self.bias)
        return y + 10 if self.training else y


class OwnLinear(nn.Module):
    """A layer of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = NoisyLinear(4, 4)

    def forward(self, x: Any) -> Any:
        return self.fc(x)


class Drawn(Residual):
    """A table that is not saved and that nothing gives."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("table", torch.randn(40, 4, generator=generator), persistent=False)

    def forward(self, x: Any) -> Any:
        return self.fc(x) + self.table[:1]
