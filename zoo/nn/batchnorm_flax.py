"""NNX BatchNorm with torch's running statistics.

The two differ in three ways. Momentum is the share of the new batch in torch, and of the old value
in Flax. torch's running variance is unbiased, Flax's is biased. And Flax computes a variance as
E[x^2] - E[x]^2 by default, which loses digits where the mean is large.
"""

from __future__ import annotations

from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from zoo.nn.options_flax import Options


class BatchNorm(nnx.BatchNorm):
    """nnx.BatchNorm over the last axis that trains as torch's does; train() and eval() switch it.

    Its state is `scale`, `bias` (Param), `mean`, `var` (BatchStat). It computes in float32 or
    wider, and returns `dtype`. ValueError in training for a batch of one value a channel.
    """

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, **kw: Unpack[Options]
    ) -> None:
        super().__init__(
            num_features, momentum=1 - momentum, epsilon=eps, use_fast_variance=False, **kw
        )
        self.new_share = momentum  # torch's; Flax's 1 - momentum has been rounded
        self.mean = nnx.BatchStat(self.mean[...].astype(self.param_dtype))
        self.var = nnx.BatchStat(self.var[...].astype(self.param_dtype))

    def __call__(  # type: ignore[override]  # no mask
        self, x: Array, use_running_average: bool | None = None
    ) -> Array:
        """(..., C) -> (..., C)."""
        assert self.scale is not None
        assert self.bias is not None
        scale, bias = self.scale[...], self.bias[...]
        given = self.dtype or jnp.result_type(x, scale)
        wide = jnp.promote_types(given, jnp.float32)
        x, scale, bias = (a.astype(wide) for a in (x, scale, bias))
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average:
            mean, var = (s[...].astype(wide) for s in (self.mean, self.var))
        else:
            mean, var = self._batch_statistics(x)
        y = (x - mean) * (scale / jnp.sqrt(var + self.epsilon)) + bias
        return y.astype(given)

    def _batch_statistics(self, x: Array) -> tuple[Array, Array]:
        """The mean and biased variance of the batch; moves the running statistics towards them."""
        count = x.size // x.shape[-1]
        if count < 2:
            raise ValueError(f"one value a channel has no variance: {x.shape}")
        axes = tuple(range(x.ndim - 1))
        mean = x.mean(axes)
        var = jnp.square(x - mean).mean(axes)
        for running, new in ((self.mean, mean), (self.var, var * (count / (count - 1)))):
            old = running[...].astype(x.dtype)
            moved = (1 - self.new_share) * old + self.new_share * new
            running[...] = jax.lax.stop_gradient(moved).astype(running[...].dtype)
        return mean, var


BatchNorm1d = BatchNorm  # (B, C) or (B, T, C)
BatchNorm2d = BatchNorm  # (B, H, W, C)
