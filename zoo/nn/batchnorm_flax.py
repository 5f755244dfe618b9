"""NNX BatchNorm with torch's running statistics.

The two differ in three ways. Momentum is the share of the new batch in torch, and of the old value
in Flax. torch's running variance is unbiased, Flax's is biased. And Flax computes a variance as
E[x^2] - E[x]^2 by default, which loses digits where the mean is large.
"""

from __future__ import annotations

from typing import ClassVar, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from zoo.nn.options_flax import Options


class BatchNorm(nnx.BatchNorm):
    """nnx.BatchNorm over the last axis that trains as torch's does; train() and eval() switch it.

    Its state is `scale`, `bias` (Param; without `affine` neither), `mean`, `var` (BatchStat;
    without `track_running_stats` neither: the batch's own are taken always). It computes in
    float32 or wider, and returns `dtype`. ValueError for a batch of one value a channel where its
    own statistics are taken.
    """

    channels: ClassVar[int] = -1  # their axis

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        **kw: Unpack[Options],
    ) -> None:
        super().__init__(
            num_features,
            axis=self.channels,
            momentum=1 - momentum,
            epsilon=eps,
            use_bias=affine,
            use_scale=affine,
            use_fast_variance=False,
            **kw,
        )
        self.new_share = momentum  # torch's; Flax's 1 - momentum has been rounded
        self.tracks = track_running_stats
        if track_running_stats:
            self.mean = nnx.BatchStat(self.mean[...].astype(self.param_dtype))
            self.var = nnx.BatchStat(self.var[...].astype(self.param_dtype))
        else:
            del self.mean, self.var

    def __call__(  # type: ignore[override]  # no mask
        self, x: Array, use_running_average: bool | None = None
    ) -> Array:
        """(..., C) -> (..., C)."""
        affine = [p[...] for p in (self.scale, self.bias) if p is not None]
        given = self.dtype or jnp.result_type(x, *affine)
        wide = jnp.promote_types(given, jnp.float32)
        x, *affine = (a.astype(wide) for a in (x, *affine))
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average and self.tracks:
            mean, var = (s[...].astype(wide) for s in (self.mean, self.var))
        else:
            mean, var = self._batch_statistics(x)
        scale, bias = affine or (jnp.ones((), wide), jnp.zeros((), wide))
        factor = scale / jnp.sqrt(var + self.epsilon)
        y = (x - self._along(x, mean)) * self._along(x, factor) + self._along(x, bias)
        return y.astype(given)

    def _along(self, x: Array, values: Array) -> Array:
        """One value a channel, so that it broadcasts against x."""
        if not values.ndim:
            return values
        return jnp.expand_dims(values, [a for a in range(x.ndim) if a != self.channels % x.ndim])

    def _batch_statistics(self, x: Array) -> tuple[Array, Array]:
        """The mean and biased variance of the batch; moves the running statistics towards them."""
        count = x.size // x.shape[self.channels]
        if count < 2:
            raise ValueError(f"one value a channel has no variance: {x.shape}")
        axes = tuple(a for a in range(x.ndim) if a != self.channels % x.ndim)
        mean = x.mean(axes)
        var = jnp.square(x - self._along(x, mean)).mean(axes)
        if not self.tracks:
            return mean, var
        for running, new in ((self.mean, mean), (self.var, var * (count / (count - 1)))):
            old = running[...].astype(x.dtype)
            moved = (1 - self.new_share) * old + self.new_share * new
            running[...] = jax.lax.stop_gradient(moved).astype(running[...].dtype)
        return mean, var


BatchNorm1d = BatchNorm  # (B, C) or (B, T, C)
BatchNorm2d = BatchNorm  # (B, H, W, C)
