"""Root mean square layer norm (Zhang and Sennrich 2019), as T5 has it."""

from __future__ import annotations

from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from zoo.nn.options_flax import Options


class RMSNorm(nnx.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis; `eps` has no default.

    The mean square is in float32 or wider; upstream's T5 always takes it in float32. `eps` None is
    the machine epsilon of what it is taken in, torch.nn.RMSNorm's default.
    """

    def __init__(self, dim: int, eps: float | None, **kw: Unpack[Options]) -> None:
        super().__init__(dim, epsilon=eps or 0.0, use_fast_variance=False, **kw)
        self.machine = eps is None

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        if not self.machine:
            y: Array = super().__call__(x, mask)
            return y
        assert self.scale is not None
        scale = self.scale[...]
        given = self.dtype or jnp.result_type(x, scale)
        wide = jnp.promote_types(given, jnp.float32)
        square = jnp.square(x.astype(wide)).mean(-1, keepdims=True)
        factor = jax.lax.rsqrt(square + jnp.finfo(wide).eps) * scale.astype(wide)
        return (x.astype(wide) * factor).astype(given)
