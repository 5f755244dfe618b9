"""A causal, dilated convolution over time, whole sequences or one sample at a time.

B sequences of T steps, C channels in and O out, k taps, d steps apart.
"""

from __future__ import annotations

from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from zoo.nn.options_flax import Options


class CausalConv1d(nnx.Conv):
    """nnx.Conv that sees no later step: zeros before the first one, none after the last.

    Of `kernel` (k, C, O), kernel[-1] is for the present step.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        dilation: int = 1,
        bias: bool = True,
        **kw: Unpack[Options],
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            (kernel_size,),
            kernel_dilation=dilation,
            padding="CAUSAL",
            use_bias=bias,
            **kw,
        )
        self.dilation = dilation
        self.reach = dilation * (kernel_size - 1)  # how many steps it looks back

    # __call__: (B, T, C) -> (B, T, O), inherited.

    def ring(self, batch: int, dtype: DTypeLike) -> Array:
        """The ring buffer of past inputs before the first step: zeros (reach, B, C)."""
        return jnp.zeros((self.reach, batch, self.in_features), dtype)

    def window(self, ring: Array, input: Array, t: Array) -> tuple[Array, Array]:
        """What the convolution sees at step t, (B, k, C), and the ring with that step written.

        `input` (B, 1, C) is that of step t. The input of an earlier step s is ring[s % reach].
        """
        if self.reach == 0:
            return input, ring
        k, d = self.kernel_size[0], self.dilation
        steps = [(t - j * d) % self.reach for j in range(k - 1, 0, -1)]
        past = [jax.lax.dynamic_index_in_dim(ring, s, keepdims=False) for s in steps]
        window = jnp.stack([*past, input[:, 0]], axis=1)
        ring = jax.lax.dynamic_update_index_in_dim(ring, input[:, 0], t % self.reach, 0)
        return window, ring

    def step(self, window: Array) -> Array:
        """What `window` returned, (B, k, C) -> the output at that step, (B, 1, O)."""
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((window, self.kernel[...], bias), dtype=self.dtype)
        y = jnp.einsum("bkc,kco->bo", x, kernel, precision=self.precision)
        return (y if bias is None else y + bias)[:, None]
