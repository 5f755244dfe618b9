"""What draws random numbers: torch's distribution, JAX's numbers. `rng` gives a fresh key."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.porting.rules import rule
from convert.porting.rules.promote import cast, default_float

Rng = Callable[[], Any]


def _uniform(rng: Rng, shape: Sequence[int], dtype: Any) -> Any:
    wide = dtype if dtype in (np.float32, np.float64) else np.float32
    drawn = jax.random.uniform(rng(), tuple(shape), jax.dtypes.canonicalize_dtype(wide))
    return cast(drawn, dtype)


def _normal(rng: Rng, shape: Sequence[int], dtype: Any) -> Any:
    return jax.random.normal(rng(), tuple(shape), jax.dtypes.canonicalize_dtype(dtype))


def dropped(x: Any, p: float, rng: Rng, shape: Sequence[int] | None = None) -> tuple[Any, Any]:
    """x with elements, or whole parts of `shape`, set to 0 and the rest scaled; what was kept."""
    shape = x.shape if shape is None else shape
    if p >= 1:
        return x * 0, jnp.zeros(shape, np.bool_)
    keep = jax.random.bernoulli(rng(), 1 - p, tuple(shape))
    return jnp.where(keep, x / (1 - p), 0), keep


@rule("aten.dropout.default", random=True)
def dropout(x: Any, p: float, train: bool, *, rng: Rng) -> Any:
    return dropped(x, p, rng)[0] if train and p else x


@rule("aten.native_dropout.default", random=True)
def native_dropout(x: Any, p: float, train: bool | None, *, rng: Rng) -> tuple[Any, Any]:
    if train is False or not p:
        return x, jnp.ones(x.shape, np.bool_)
    return dropped(x, p, rng)


def _channels(x: Any) -> tuple[int, ...]:
    return (*x.shape[:2], *(1,) * (x.ndim - 2))


@rule("aten.feature_dropout.default", random=True)
def feature_dropout(x: Any, p: float, train: bool, *, rng: Rng) -> Any:
    return dropped(x, p, rng, _channels(x))[0] if train and p else x


def _alpha(x: Any, p: float, rng: Rng, shape: Sequence[int]) -> Any:
    """Dropout to SELU's low end, which keeps mean and variance (Klambauer 2017)."""
    low = -1.7580993408473766
    if p >= 1:
        return x * 0
    a = 1 / math.sqrt((low**2 * p + 1) * (1 - p))
    keep = jax.random.bernoulli(rng(), 1 - p, tuple(shape))
    return jnp.where(keep, x, low) * a - low * p * a


@rule("aten.alpha_dropout.default", random=True)
def alpha_dropout(x: Any, p: float, train: bool, *, rng: Rng) -> Any:
    return _alpha(x, p, rng, x.shape) if train and p else x


@rule("aten.feature_alpha_dropout.default", random=True)
def feature_alpha_dropout(x: Any, p: float, train: bool, *, rng: Rng) -> Any:
    return _alpha(x, p, rng, _channels(x)) if train and p else x


@rule("aten.rand.default", random=True)
def rand(size: Sequence[int], *, dtype: Any = None, rng: Rng) -> Any:
    return _uniform(rng, size, default_float() if dtype is None else dtype)


@rule("aten.rand_like.default", random=True)
def rand_like(x: Any, *, dtype: Any = None, rng: Rng) -> Any:
    return _uniform(rng, x.shape, x.dtype if dtype is None else dtype)


@rule("aten.randn.default", random=True)
def randn(size: Sequence[int], *, dtype: Any = None, rng: Rng) -> Any:
    return _normal(rng, size, default_float() if dtype is None else dtype)


@rule("aten.randn_like.default", random=True)
def randn_like(x: Any, *, dtype: Any = None, rng: Rng) -> Any:
    return _normal(rng, x.shape, x.dtype if dtype is None else dtype)


def _integers(rng: Rng, shape: Sequence[int], low: int, high: int, dtype: Any) -> Any:
    whole = jax.dtypes.canonicalize_dtype(np.int64)
    return cast(jax.random.randint(rng(), tuple(shape), low, high, whole), dtype)


@rule("aten.randint.default", random=True)
def randint(high: int, size: Sequence[int], *, dtype: Any = None, rng: Rng) -> Any:
    return _integers(rng, size, 0, high, np.int64 if dtype is None else dtype)


@rule("aten.randint.low", random=True)
def randint_low(low: int, high: int, size: Sequence[int], *, dtype: Any = None, rng: Rng) -> Any:
    return _integers(rng, size, low, high, np.int64 if dtype is None else dtype)


@rule("aten.randint_like.default", random=True)
def randint_like(x: Any, high: int, *, dtype: Any = None, rng: Rng) -> Any:
    return _integers(rng, x.shape, 0, high, x.dtype if dtype is None else dtype)


@rule("aten.randint_like.low_dtype", random=True)
def randint_like_low(x: Any, low: int, high: int, *, dtype: Any = None, rng: Rng) -> Any:
    return _integers(rng, x.shape, low, high, x.dtype if dtype is None else dtype)


@rule("aten.randperm.default", random=True)
def randperm(n: int, *, dtype: Any = None, rng: Rng) -> Any:
    return cast(jax.random.permutation(rng(), n), np.int64 if dtype is None else dtype)


@rule("aten.bernoulli.default", random=True)
def bernoulli(p: Any, *, rng: Rng) -> Any:
    return cast(jax.random.bernoulli(rng(), p), p.dtype)


@rule("aten.bernoulli.p", random=True)
def bernoulli_p(x: Any, p: float, *, rng: Rng) -> Any:
    return cast(jax.random.bernoulli(rng(), p, x.shape), x.dtype)


@rule("aten.bernoulli.Tensor", random=True)
def bernoulli_tensor(x: Any, p: Any, *, rng: Rng) -> Any:
    return cast(jax.random.bernoulli(rng(), p, x.shape), x.dtype)


@rule(
    "aten.normal.Tensor_Tensor",
    "aten.normal.Tensor_float",
    "aten.normal.float_Tensor",
    random=True,
)
def normal(mean: Any, std: Any = 1.0, *, rng: Rng) -> Any:
    shape = jnp.broadcast_shapes(np.shape(mean), np.shape(std))
    dtype = mean.dtype if hasattr(mean, "dtype") else std.dtype
    return mean + cast(std, dtype) * _normal(rng, shape, dtype)


@rule("aten.normal.float_float", random=True)
def normal_of_size(
    mean: float, std: float, size: Sequence[int], *, dtype: Any = None, rng: Rng
) -> Any:
    return mean + std * _normal(rng, size, default_float() if dtype is None else dtype)


@rule("aten.normal_functional.default", random=True)
def normal_functional(x: Any, mean: float = 0.0, std: float = 1.0, *, rng: Rng) -> Any:
    return mean + std * _normal(rng, x.shape, x.dtype)


@rule("aten.uniform.default", random=True)
def uniform(x: Any, low: float = 0.0, high: float = 1.0, *, rng: Rng) -> Any:
    return low + (high - low) * _uniform(rng, x.shape, x.dtype)


@rule("aten.exponential.default", random=True)
def exponential(x: Any, lambd: float = 1.0, *, rng: Rng) -> Any:
    return jax.random.exponential(rng(), x.shape, x.dtype) / lambd


@rule("aten.multinomial.default", random=True)
def multinomial(p: Any, num_samples: int, replacement: bool = False, *, rng: Rng) -> Any:
    """Without replacement by the largest of log p plus Gumbel noise (Kool 2019)."""
    logits = jnp.log(p)
    if replacement:
        shape = (*p.shape[:-1], num_samples)
        drawn = jax.random.categorical(rng(), logits[..., None, :], shape=shape)
    else:
        noise = jax.random.gumbel(rng(), p.shape, logits.dtype)
        drawn = jnp.argsort(logits + noise, axis=-1, descending=True)[..., :num_samples]
    return cast(drawn, np.int64)


@rule("aten.poisson.default", random=True)
def poisson(rate: Any, *, rng: Rng) -> Any:
    return cast(jax.random.poisson(rng(), rate), rate.dtype)
