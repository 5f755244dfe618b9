"""A causal, dilated convolution over time, whole sequences or one sample at a time.

B sequences of T steps, C channels in and O out, k taps, d steps apart.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.nn.layers_torch import promote


class CausalConv1d(nn.Conv1d):
    """nn.Conv1d that sees no later step: zeros before the first one, none after the last.

    Of `weight` (O, C, k), weight[..., -1] is for the present step. `dtype` and `param_dtype` are
    those of `zoo.nn.layers_torch`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        dilation: int = 1,
        bias: bool = True,
        *,
        dtype: torch.dtype | None = None,
        param_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, dilation=dilation, bias=bias, dtype=param_dtype
        )
        self.dtype = dtype
        self.reach = dilation * (kernel_size - 1)  # how many steps it looks back

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, T) -> (B, O, T)."""
        if self.reach == 0 and input.shape[-1] == 1:  # one step of a 1x1 convolution
            return self.step(input)
        x, weight, bias = self._promoted(F.pad(input, (self.reach, 0)))
        return F.conv1d(x, weight, bias, dilation=self.dilation)

    def ring(self, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The ring buffer of past inputs before the first step: zeros (reach, B, C)."""
        return torch.zeros(self.reach, batch, self.in_channels, dtype=dtype, device=device)

    def window(self, ring: Tensor, input: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """What the convolution sees at step t, (B, C, k), and the ring with that step written.

        `input` (B, C, 1) is that of step t. The input of an earlier step s is ring[s % reach].
        The ring is changed in place.
        """
        if self.reach == 0:
            return input, ring
        k, d = self.kernel_size[0], self.dilation[0]
        past = [ring[(t - j * d) % self.reach] for j in range(k - 1, 0, -1)]
        window = torch.stack([*past, input[:, :, 0]], dim=-1)
        ring[t % self.reach] = input[:, :, 0]
        return window, ring

    def step(self, window: Tensor) -> Tensor:
        """What `window` returned, (B, C, k) -> the output at that step, (B, O, 1).

        A matrix product: for a single step it is many times faster than torch's convolution.
        """
        x, weight, bias = self._promoted(window)
        return F.linear(x.flatten(1), weight.flatten(1), bias)[:, :, None]

    def _promoted(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.bias is None:
            x, weight = promote(self.dtype, x, self.weight)
            return x, weight, None
        x, weight, bias = promote(self.dtype, x, self.weight, self.bias)
        return x, weight, bias
