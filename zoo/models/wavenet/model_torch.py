"""WaveNet in PyTorch. van den Oord 2016, https://arxiv.org/abs/1609.03499.

B sequences of T samples, Q classes of a sample, R residual channels, D channels of the filter and
of the gate, S skip channels; G channels of a global condition and L of a local one.
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
        return torch.tanh(filter) * torch.sigmoid(gate)


class WaveNetLayer(nn.Module):
    """A dilated convolution and its gate, with residual and skip connections (figure 4).

    The last layer has no `residual`: nothing would come after it.
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
        self, x: Tensor, skips: Tensor, global_condition: Tensor | None, local: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x (B, R, T) for the next layer, and `skips` (B, S, T) with this layer's added to it.

        Conditions are (B, G) and (B, L, T).
        """
        f, g = self.filter(x), self.gate(x)
        return self.connect(x, skips, f, g, global_condition, local)

    def step(
        self,
        x: Tensor,
        skips: Tensor,
        ring: Tensor,
        t: int,
        global_condition: Tensor | None,
        local: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same for step t alone, x (B, R, 1); and the ring with that step in it."""
        window, ring = self.filter.window(ring, x, t)
        f, g = self.filter.step(window), self.gate.step(window)
        return *self.connect(x, skips, f, g, global_condition, local), ring

    def connect(
        self,
        x: Tensor,
        skips: Tensor,
        f: Tensor,
        g: Tensor,
        global_condition: Tensor | None,
        local: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """What follows the dilated convolutions. No step looks at another one here."""
        if global_condition is not None:  # section 2.5
            f = f + self.filter_global(global_condition)[:, :, None]
            g = g + self.gate_global(global_condition)[:, :, None]
        if local is not None:
            f = f + self.filter_local(local)
            g = g + self.gate_local(local)
        z = self.unit(f, g)
        if self.residual is not None:
            x = x + self.residual(z)
        return x, skips + self.skip(z)


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
        """samples (B, T), integers in [0, Q) -> logits (B, T, Q); at t they are of sample t + 1.

        `global_condition` (B, G); `local_condition` (B, T, L), at t what sample t + 1 depends on.
        """
        self.check(global_condition, local_condition)
        local = None if local_condition is None else local_condition.transpose(1, 2)
        x = self.input(self.one_hot(samples))
        skips = x.new_zeros(())  # the first layer makes it (B, S, T)
        for layer in self.layers:
            x, skips = layer(x, skips, global_condition, local)
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

        The likeliest each time, or, with `uniforms` (B, steps) in [0, 1), drawn by them from the
        softmax of logits / temperature. Every convolution keeps its past inputs in a ring, so a
        step costs the same however many came before. `local_condition` (B, P + steps - 1, L).
        """
        self.check(global_condition, local_condition)
        if samples.shape[1] < 1 or steps < 1:
            raise ValueError("there is nothing to start from, or nothing to make")
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
        """The state before the first sample: the past of the input and of every layer."""
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
        """Sample t (B,), local condition (B, L, 1) -> logits (B, Q) of the next; the rings."""
        window, first = self.input.window(rings[0], self.one_hot(sample[:, None]), t)
        x = self.input.step(window)
        skips = x.new_zeros(())  # the first layer makes it (B, S, T)
        after = [first]
        for layer, ring in zip(self.layers, rings[1:], strict=True):
            x, skips, ring = layer.step(x, skips, ring, t, global_condition, local)
            after.append(ring)
        return self.head(skips)[:, 0], after

    def head(self, skips: Tensor) -> Tensor:
        """The sum of all skip connections (B, S, T) -> logits (B, T, Q)."""
        x = self.output1(F.relu(skips))
        return self.output2(F.relu(x)).transpose(1, 2)

    def one_hot(self, samples: Tensor) -> Tensor:
        """(B, T) integers -> (B, Q, T)."""
        return F.one_hot(samples.long(), self.config.classes).mT.to(self.compute_dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        """What activations are in."""
        return self.input.dtype or self.input.weight.dtype

    def check(self, global_condition: Tensor | None, local_condition: Tensor | None) -> None:
        """Raises ValueError unless the conditions given are those that the config asks for."""
        self.config.check(global_condition is not None, local_condition is not None)
