"""WaveNet in PyTorch. van den Oord 2016, https://arxiv.org/abs/1609.03499.

    model = WaveNet(Config())
    logits = model(samples)  # (B, T) -> (B, T, 256)

B sequences of T samples, Q classes of a sample, R residual channels, D channels of the filter and
of the gate, S skip channels; G channels of a global condition and L of a local one. `**kw` is
`dtype` and `param_dtype`, which every layer takes.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.models.wavenet.config import Config
from zoo.nn.causal_conv_torch import CausalConv1d
from zoo.nn.generation_torch import choose_token
from zoo.nn.layers_torch import Linear
from zoo.nn.options_torch import Options


class GatedUnit(nn.Module):
    """tanh(filter) * sigmoid(gate) (equation 2)."""

    def forward(self, filter: Tensor, gate: Tensor) -> Tensor:
        """(B, D, T) both -> (B, D, T)."""
        return torch.tanh(filter) * torch.sigmoid(gate)


class WaveNetLayer(nn.Module):
    """A dilated convolution with a gate, and its residual and skip connections (figure 4).

    The last layer has no `residual`, as no layer follows.
    """

    def __init__(self, c: Config, dilation: int, last: bool, **kw: Unpack[Options]) -> None:
        super().__init__()
        R, D = c.residual_channels, c.gate_channels
        self.filter = CausalConv1d(R, D, c.kernel_size, dilation, **kw)
        self.gate = CausalConv1d(R, D, c.kernel_size, dilation, **kw)
        if c.global_channels:
            self.filter_global = Linear(c.global_channels, D, bias=False, **kw)
            self.gate_global = Linear(c.global_channels, D, bias=False, **kw)
        if c.local_channels:
            self.filter_local = CausalConv1d(c.local_channels, D, 1, bias=False, **kw)
            self.gate_local = CausalConv1d(c.local_channels, D, 1, bias=False, **kw)
        self.unit = GatedUnit()
        self.skip = CausalConv1d(D, c.skip_channels, 1, **kw)
        self.residual = None if last else CausalConv1d(D, R, 1, **kw)

    def forward(
        self, x: Tensor, global_condition: Tensor | None = None, local: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, R, T) -> x (B, R, T) of the next layer, and the skip connection (B, S, T).

        `global_condition` (B, G), `local` (B, L, T).
        """
        f, g = self.filter(x), self.gate(x)
        return self.connect(x, f, g, global_condition, local)

    def step(
        self,
        x: Tensor,
        ring: Tensor,
        t: int,
        global_condition: Tensor | None = None,
        local: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `forward`, for step t alone: x (B, R, 1). Also returns the ring with x written."""
        window, ring = self.filter.window(ring, x, t)  # the gate sees the same past
        f, g = self.filter.step(window), self.gate.step(window)
        x, skip = self.connect(x, f, g, global_condition, local)
        return x, skip, ring

    def connect(
        self,
        x: Tensor,
        f: Tensor,
        g: Tensor,
        global_condition: Tensor | None,
        local: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """What follows the dilated convolutions, of outputs f and g (B, D, T)."""
        if global_condition is not None:  # section 2.5
            f = f + self.filter_global(global_condition)[:, :, None]
            g = g + self.gate_global(global_condition)[:, :, None]
        if local is not None:
            f = f + self.filter_local(local)
            g = g + self.gate_local(local)
        z = self.unit(f, g)
        if self.residual is not None:
            x = x + self.residual(z)
        return x, self.skip(z)


class WaveNet(nn.Module):
    """Logits of the next sample's class, from all samples up to the present one."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.config = c
        last = c.layers - 1
        self.input = CausalConv1d(c.classes, c.residual_channels, c.kernel_size, **kw)
        self.layers: Any = nn.ModuleList(
            WaveNetLayer(c, dilation, i == last, **kw) for i, dilation in enumerate(c.dilations)
        )
        self.output1 = CausalConv1d(c.skip_channels, c.skip_channels, 1, **kw)
        self.output2 = CausalConv1d(c.skip_channels, c.classes, 1, **kw)

    def forward(
        self,
        samples: Tensor,
        global_condition: Tensor | None = None,
        local_condition: Tensor | None = None,
    ) -> Tensor:
        """samples (B, T), integers in [0, Q) -> logits (B, T, Q); those at t predict sample t + 1.

        `global_condition` (B, G); `local_condition` (B, T, L), at t the one of sample t + 1.
        ValueError unless the conditions given are those that the config has channels for.
        """
        self.config.check(global_condition is not None, local_condition is not None)
        local = None if local_condition is None else local_condition.transpose(1, 2)
        x = self.input(self.one_hot(samples))
        skips = x.new_zeros(())  # (B, S, T) from the first layer on
        for layer in self.layers:
            x, skip = layer(x, global_condition, local)
            skips = skips + skip
        return self.head(skips)

    @torch.no_grad()
    def generate(
        self,
        samples: Tensor,
        steps: int,
        uniforms: Tensor | None = None,
        temperature: float = 1.0,
        global_condition: Tensor | None = None,
        local_condition: Tensor | None = None,
    ) -> Tensor:
        """The `steps` samples that follow `samples` (B, P), P at least 1: integers (B, steps).

        Each is the likeliest, or, with `uniforms` (B, steps) in [0, 1), drawn by these numbers from
        the softmax of logits / temperature. `local_condition` (B, P + steps - 1, L). Every
        convolution keeps its past inputs in a ring buffer, so that all steps cost the same.
        """
        self.config.check(global_condition is not None, local_condition is not None)
        if samples.shape[1] < 1:
            raise ValueError("samples are empty: there is nothing to start from")
        if steps < 1:
            raise ValueError(f"steps is {steps}: there is nothing to make")
        rings = self.rings(samples.shape[0])
        prompt = samples.shape[1]
        sample = samples[:, 0]
        made: list[Tensor] = []
        for t in range(prompt + steps - 1):
            local = None if local_condition is None else local_condition[:, t, :, None]
            logits, rings = self.step(sample, rings, t, global_condition, local)
            if t + 1 < prompt:
                sample = samples[:, t + 1]
            else:
                u = None if uniforms is None else uniforms[:, t + 1 - prompt]
                sample = choose_token(logits, u, temperature)
                made.append(sample)
        return torch.stack(made, dim=1)

    def rings(self, batch: int) -> list[Tensor]:
        """The ring buffers before the first sample: of the input, and of every layer."""
        dtype, device = self.compute_dtype, self.input.weight.device
        convs = [self.input, *(layer.filter for layer in self.layers)]
        return [conv.ring(batch, dtype, device) for conv in convs]

    def step(
        self,
        sample: Tensor,
        rings: list[Tensor],
        t: int,
        global_condition: Tensor | None = None,
        local: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Sample t (B,), `local` (B, L, 1) -> logits (B, Q) of sample t + 1, and the rings."""
        window, first = self.input.window(rings[0], self.one_hot(sample[:, None]), t)
        x = self.input.step(window)
        skips = x.new_zeros(())  # (B, S, 1) from the first layer on
        written = [first]
        for layer, ring in zip(self.layers, rings[1:], strict=True):
            x, skip, ring = layer.step(x, ring, t, global_condition, local)
            skips = skips + skip
            written.append(ring)
        return self.head(skips)[:, 0], written

    def head(self, skips: Tensor) -> Tensor:
        """The sum of all skip connections (B, S, T) -> logits (B, T, Q)."""
        x = self.output1(F.relu(skips))
        return self.output2(F.relu(x)).transpose(1, 2)

    def one_hot(self, samples: Tensor) -> Tensor:
        """(B, T) integers -> (B, Q, T)."""
        return F.one_hot(samples.long(), self.config.classes).mT.to(self.compute_dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return self.input.dtype or self.input.weight.dtype
