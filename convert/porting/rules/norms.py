"""Normalisation: layer, group, instance, batch with its statistics, RMS, weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from convert.porting.rules import rule
from convert.porting.rules.promote import cast, opmath, promote_types


def _normalised(x: Any, axes: tuple[int, ...], eps: float) -> tuple[Any, Any, Any]:
    """x to mean 0 and variance 1 over axes, the mean, and 1 / deviation."""
    mean = jnp.mean(x, axis=axes, keepdims=True)
    center = x - mean
    rstd = lax.rsqrt(jnp.mean(center * center, axis=axes, keepdims=True) + eps)
    return center * rstd, mean, rstd


def _affine(y: Any, weight: Any, bias: Any, shape: Sequence[int]) -> Any:
    if weight is not None:
        y = y * cast(weight, y.dtype).reshape(shape)
    return y if bias is None else y + cast(bias, y.dtype).reshape(shape)


@rule("aten.native_layer_norm.default")
def native_layer_norm(
    x: Any, normalized_shape: Sequence[int], weight: Any, bias: Any, eps: float
) -> tuple[Any, Any, Any]:
    axes = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    y, mean, rstd = _normalised(cast(x, opmath(x.dtype)), axes, eps)
    return cast(_affine(y, weight, bias, normalized_shape), x.dtype), mean, rstd


@rule("aten.layer_norm.default")
def layer_norm(
    x: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    return native_layer_norm(x, normalized_shape, weight, bias, eps)[0]


@rule("aten.group_norm.default")
def group_norm(
    x: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    return _group_norm(x, num_groups, weight, bias, eps)[0]


def _group_norm(x: Any, groups: int, weight: Any, bias: Any, eps: float) -> tuple[Any, Any, Any]:
    n, c, *space = x.shape
    wider = cast(x, opmath(x.dtype)).reshape(n, groups, (c // groups) * math.prod(space))
    y, mean, rstd = _normalised(wider, (2,), eps)
    y = _affine(y.reshape(x.shape), weight, bias, (c, *(1,) * len(space)))
    return cast(y, x.dtype), mean[..., 0], rstd[..., 0]


@rule("aten.native_group_norm.default")
def native_group_norm(
    x: Any, weight: Any, bias: Any, n: int, c: int, hw: int, group: int, eps: float
) -> tuple[Any, Any, Any]:
    return _group_norm(x, group, weight, bias, eps)


def _rms(x: Any, normalized_shape: Sequence[int], weight: Any, eps: float | None) -> Any:
    dtype = opmath(x.dtype)
    eps = float(np.finfo(dtype).eps) if eps is None else eps
    axes = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    wider = cast(x, dtype)
    rstd = lax.rsqrt(jnp.mean(wider * wider, axis=axes, keepdims=True) + eps)
    y = wider * rstd
    result = x.dtype if weight is None else promote_types(x.dtype, weight.dtype)
    return cast(_affine(y, weight, None, normalized_shape), result), rstd


@rule("aten.rms_norm.default")
def rms_norm(
    x: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Any:
    return _rms(x, normalized_shape, weight, eps)[0]


@rule("aten._fused_rms_norm.default")
def fused_rms_norm(x: Any, normalized_shape: Sequence[int], weight: Any, eps: float | None) -> Any:
    return _rms(x, normalized_shape, weight, eps)


# -- with statistics ----------------------------------------------------------------------------


def _batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> tuple[Any, Any, Any, Any, Any]:
    """The output, the batch's mean and 1 / deviation, the new running mean and variance: that
    one is of n - 1, while what normalises is of n."""
    dtype = opmath(x.dtype)
    wider = cast(x, dtype)
    shape = (1, -1, *(1,) * (x.ndim - 2))
    if not training:
        rstd = lax.rsqrt(cast(var, dtype) + eps)
        y = (wider - cast(mean, dtype).reshape(shape)) * rstd.reshape(shape)
        empty = jnp.zeros((0,), dtype)
        return cast(_affine(y, weight, bias, shape), x.dtype), empty, empty, mean, var
    axes = (0, *range(2, x.ndim))
    center = jnp.mean(wider, axis=axes)
    apart = wider - center.reshape(shape)
    biased = jnp.mean(apart * apart, axis=axes)
    rstd = lax.rsqrt(biased + eps)
    y = _affine(apart * rstd.reshape(shape), weight, bias, shape)
    n = x.size // x.shape[1]
    if mean is not None:
        unbiased = biased * (n / max(n - 1, 1))
        mean = cast((1 - momentum) * mean + momentum * lax.stop_gradient(center), mean.dtype)
        var = cast((1 - momentum) * var + momentum * lax.stop_gradient(unbiased), var.dtype)
    return cast(y, x.dtype), center, rstd, mean, var


@rule("aten._native_batch_norm_legit_functional.default")
def batch_norm_functional(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> tuple[Any, Any, Any, Any, Any]:
    return _batch_norm(x, weight, bias, mean, var, training, momentum, eps)


@rule("aten._native_batch_norm_legit_no_training.default")
def batch_norm_no_training(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float
) -> tuple[Any, Any, Any]:
    return _batch_norm(x, weight, bias, mean, var, False, momentum, eps)[:3]


@rule("aten._native_batch_norm_legit.no_stats")
def batch_norm_no_stats(
    x: Any, weight: Any, bias: Any, training: bool, momentum: float, eps: float
) -> tuple[Any, Any, Any]:
    return _batch_norm(x, weight, bias, None, None, True, momentum, eps)[:3]


@rule("aten.batch_norm.default")
def batch_norm(
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Any:
    """The output alone: a graph that updates the statistics has the functional overload."""
    return _batch_norm(x, weight, bias, mean, var, training, momentum, eps)[0]


@rule("aten._batch_norm_no_update.default")
def batch_norm_no_update(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float
) -> tuple[Any, ...]:
    empty = jnp.zeros((0,), np.uint8)
    return (*_batch_norm(x, weight, bias, mean, var, False, momentum, eps)[:3], empty)


@rule("aten.instance_norm.default")
def instance_norm(
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Any:
    if not use_input_stats:
        return _batch_norm(x, weight, bias, mean, var, False, momentum, eps)[0]
    axes = tuple(range(2, x.ndim))
    y, _, _ = _normalised(cast(x, opmath(x.dtype)), axes, eps)
    return cast(_affine(y, weight, bias, (-1, *(1,) * (x.ndim - 2))), x.dtype)


# -- of weights ---------------------------------------------------------------------------------


def _norm_except(v: Any, dim: int) -> Any:
    axes = tuple(range(v.ndim)) if dim == -1 else tuple(i for i in range(v.ndim) if i != dim)
    return jnp.sqrt(jnp.sum(v * v, axis=axes, keepdims=dim != -1))


@rule("aten._weight_norm.default")
def weight_norm(v: Any, g: Any, dim: int = 0) -> Any:
    return v * (g / _norm_except(v, dim))


@rule("aten._weight_norm_interface.default")
def weight_norm_interface(v: Any, g: Any, dim: int = 0) -> tuple[Any, Any]:
    norm = _norm_except(v, dim)
    return v * (g / norm), norm


@rule("aten.norm_except_dim.default")
def norm_except_dim(v: Any, pow: int = 2, dim: int = 0) -> Any:
    axes = tuple(i for i in range(v.ndim) if i != dim)
    if dim == -1:
        return jnp.sum(jnp.abs(v) ** pow) ** (1 / pow)
    return jnp.sum(jnp.abs(v) ** pow, axis=axes, keepdims=True) ** (1 / pow)
