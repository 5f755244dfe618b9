"""WaveNet once more, from the paper's equations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from upstream import Document, Upstream
from zoo import probe
from zoo.models.wavenet import MODEL
from zoo.models.wavenet.config import Config


class Plain(nn.Module):
    """The paper's equations, with nothing of the zoo in them."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        R, D, S, k = c.residual_channels, c.gate_channels, c.skip_channels, c.kernel_size
        self.input = nn.Conv1d(c.classes, R, k, padding=k - 1)
        self.layers = nn.ModuleList()
        for i in range(c.layers):
            d = 2 ** (i % c.dilation_cycle)
            layer = nn.Module()
            layer.filter = nn.Conv1d(R, D, k, dilation=d, padding=(k - 1) * d)
            layer.gate = nn.Conv1d(R, D, k, dilation=d, padding=(k - 1) * d)
            if c.global_channels:
                layer.filter_global = nn.Linear(c.global_channels, D, bias=False)
                layer.gate_global = nn.Linear(c.global_channels, D, bias=False)
            if c.local_channels:
                layer.filter_local = nn.Conv1d(c.local_channels, D, 1, bias=False)
                layer.gate_local = nn.Conv1d(c.local_channels, D, 1, bias=False)
            layer.skip = nn.Conv1d(D, S, 1)
            if i + 1 < c.layers:
                layer.residual = nn.Conv1d(D, R, 1)
            self.layers.append(layer)
        self.output1 = nn.Conv1d(S, S, 1)
        self.output2 = nn.Conv1d(S, c.classes, 1)

    def forward(
        self, samples: Any, global_condition: Any = None, local_condition: Any = None
    ) -> Any:
        T = samples.shape[1]
        eye = torch.eye(self.c.classes, dtype=self.input.weight.dtype)
        x = self.input(eye[samples].transpose(1, 2))[:, :, :T]
        total = 0.0
        for layer in self.layers:
            f, g = layer.filter(x)[:, :, :T], layer.gate(x)[:, :, :T]
            if global_condition is not None:
                f = f + layer.filter_global(global_condition).unsqueeze(-1)
                g = g + layer.gate_global(global_condition).unsqueeze(-1)
            if local_condition is not None:
                f = f + layer.filter_local(local_condition.transpose(1, 2))
                g = g + layer.gate_local(local_condition.transpose(1, 2))
            z = f.tanh() * g.sigmoid()
            total = total + layer.skip(z)
            if hasattr(layer, "residual"):
                x = x + layer.residual(z)
        return self.output2(F.relu(self.output1(F.relu(total)))).transpose(1, 2)


SMALL = MODEL.presets["wavenet_small"]
LONG = {"samples": probe.integers("samples", (1, 40), SMALL.classes)}

UPSTREAM = Upstream(
    Plain,
    lambda module, given: module(**given),
    documents={"wavenet_small": Document(SMALL, lambda: Plain(SMALL), LONG)},
)
