"""Root mean square layer norm (Zhang and Sennrich 2019), as T5 has it."""

from __future__ import annotations

from typing import Unpack

from flax import nnx

from zoo.nn.options_flax import Options


class RMSNorm(nnx.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis; `eps` has no default.

    The mean square is in float32 or wider; upstream's T5 always takes it in float32.
    """

    def __init__(self, dim: int, eps: float, **kw: Unpack[Options]) -> None:
        super().__init__(dim, epsilon=eps, use_fast_variance=False, **kw)
