"""Losses. `reduction` is 0 none, 1 mean, 2 sum."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.porting.rules import rule
from convert.porting.rules.activations import log_softmax
from convert.porting.rules.elementwise import absolute
from convert.porting.rules.promote import refuse, together


def _reduced(loss: Any, reduction: int) -> Any:
    return loss if reduction == 0 else jnp.mean(loss) if reduction == 1 else jnp.sum(loss)


@rule("aten.mse_loss.default")
def mse_loss(x: Any, target: Any, reduction: int = 1) -> Any:
    x, target = together(x, target)
    return _reduced((x - target) ** 2, reduction)


@rule("aten.l1_loss.default")
def l1_loss(x: Any, target: Any, reduction: int = 1) -> Any:
    x, target = together(x, target)
    return _reduced(absolute(x - target), reduction)


@rule("aten.smooth_l1_loss.default")
def smooth_l1_loss(x: Any, target: Any, reduction: int = 1, beta: float = 1.0) -> Any:
    x, target = together(x, target)
    if beta == 0:
        return _reduced(absolute(x - target), reduction)
    d = jnp.abs(x - target)
    return _reduced(jnp.where(d < beta, 0.5 * d * d / beta, d - 0.5 * beta), reduction)


@rule("aten.huber_loss.default")
def huber_loss(x: Any, target: Any, reduction: int = 1, delta: float = 1.0) -> Any:
    x, target = together(x, target)
    d = jnp.abs(x - target)
    loss = jnp.where(d <= delta, 0.5 * d * d, delta * (d - 0.5 * delta))
    return _reduced(loss, reduction)


@rule("aten.soft_margin_loss.default")
def soft_margin_loss(x: Any, target: Any, reduction: int = 1) -> Any:
    return _reduced(jnp.log1p(jnp.exp(-target * x)), reduction)


@rule("aten.binary_cross_entropy.default")
def binary_cross_entropy(x: Any, target: Any, weight: Any = None, reduction: int = 1) -> Any:
    loss = (target - 1) * jnp.maximum(jnp.log1p(-x), -100) - target * jnp.maximum(jnp.log(x), -100)
    return _reduced(loss if weight is None else loss * weight, reduction)


@rule("aten.binary_cross_entropy_with_logits.default")
def bce_with_logits(
    x: Any, target: Any, weight: Any = None, pos_weight: Any = None, reduction: int = 1
) -> Any:
    log_weight = 1 if pos_weight is None else (pos_weight - 1) * target + 1
    loss = (1 - target) * x - log_weight * jax.nn.log_sigmoid(x)
    return _reduced(loss if weight is None else loss * weight, reduction)


@rule("aten.kl_div.default")
def kl_div(x: Any, target: Any, reduction: int = 1, *, log_target: bool = False) -> Any:
    x, target = together(x, target)
    if log_target:
        return _reduced(jnp.exp(target) * (target - x), reduction)
    log = jnp.log(jnp.where(target == 0, 1, target))
    loss = jnp.where(jnp.isnan(target), target, target * log) - target * x
    return _reduced(loss, reduction)


@rule("aten.poisson_nll_loss.default")
def poisson_nll_loss(
    x: Any, target: Any, log_input: bool, full: bool, eps: float, reduction: int
) -> Any:
    loss = jnp.exp(x) - target * x if log_input else x - target * jnp.log(x + eps)
    if full:
        stirling = target * jnp.log(target) - target + 0.5 * jnp.log(2 * np.pi * target)
        loss = loss + jnp.where(target <= 1, 0, stirling)
    return _reduced(loss, reduction)


@rule("aten.hinge_embedding_loss.default")
def hinge_embedding_loss(x: Any, target: Any, margin: float = 1.0, reduction: int = 1) -> Any:
    loss = jnp.where(target != 1, jnp.maximum(margin - x, 0), 0)
    return _reduced(loss + jnp.where(target != -1, x, 0), reduction)


@rule("aten.margin_ranking_loss.default")
def margin_ranking_loss(
    a: Any, b: Any, target: Any, margin: float = 0.0, reduction: int = 1
) -> Any:
    low = -target * (a - b) + margin
    return _reduced(jnp.where(low < 0, 0, low), reduction)


@rule("aten.cosine_embedding_loss.default")
def cosine_embedding_loss(
    a: Any, b: Any, target: Any, margin: float = 0.0, reduction: int = 1
) -> Any:
    eps = 1e-12
    squares = (jnp.sum(a * a, -1) + eps) * (jnp.sum(b * b, -1) + eps)
    cos = jnp.sum(a * b, -1) / jnp.sqrt(squares)
    low = cos - margin
    far = jnp.where(target == -1, jnp.where(low < 0, 0, low), 0)
    return _reduced(jnp.where(target == 1, 1 - cos, 0) + far, reduction)


@rule("aten.triplet_margin_loss.default")
def triplet_margin_loss(
    anchor: Any,
    positive: Any,
    negative: Any,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    reduction: int = 1,
) -> Any:
    from convert.porting.rules.linear_algebra import pairwise_distance

    near = pairwise_distance(anchor, positive, p, eps)
    far = pairwise_distance(anchor, negative, p, eps)
    if swap:
        far = jnp.minimum(far, pairwise_distance(positive, negative, p, eps))
    low = margin + near - far
    return _reduced(jnp.where(low < 0, 0, low), reduction)


def _picked(x: Any, target: Any, ignore_index: int) -> tuple[Any, Any]:
    """The value of each target's class, and which targets count. Classes are x's axis 1, or its
    only one."""
    axis = 1 if x.ndim > 1 else 0
    counts = target != ignore_index
    index = jnp.expand_dims(jnp.where(counts, target, 0), axis)
    return jnp.squeeze(jnp.take_along_axis(x, index, axis), axis), counts


def _nll(x: Any, target: Any, weight: Any, reduction: int, ignore_index: int) -> tuple[Any, Any]:
    picked, counts = _picked(x, target, ignore_index)
    safe = jnp.where(counts, target, 0)
    w = jnp.where(counts, jnp.ones((), x.dtype) if weight is None else weight[safe], 0)
    loss = jnp.where(counts, -picked, 0) * w
    total = jnp.sum(w)
    if reduction == 0:
        return loss, total if x.ndim == 1 else jnp.zeros((), x.dtype)
    return (jnp.sum(loss) / total if reduction == 1 else jnp.sum(loss)), total


@rule("aten.nll_loss_forward.default", "aten.nll_loss2d_forward.default")
def nll_loss_forward(
    x: Any, target: Any, weight: Any, reduction: int, ignore_index: int
) -> tuple[Any, Any]:
    return _nll(x, target, weight, reduction, ignore_index)


@rule("aten.nll_loss.default", "aten.nll_loss2d.default", "aten.nll_loss_nd.default")
def nll_loss(
    x: Any, target: Any, weight: Any = None, reduction: int = 1, ignore_index: int = -100
) -> Any:
    return _nll(x, target, weight, reduction, ignore_index)[0]


@rule("aten.cross_entropy_loss.default")
def cross_entropy_loss(
    x: Any,
    target: Any,
    weight: Any = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Any:
    axis = 1 if x.ndim > 1 else 0
    log = log_softmax(x, axis)
    shape = [1] * x.ndim
    shape[axis] = -1
    per_class = None if weight is None else weight.reshape(shape)
    if x.shape == target.shape and jnp.issubdtype(target.dtype, jnp.floating):
        if label_smoothing:
            target = target * (1 - label_smoothing) + label_smoothing / x.shape[axis]
        loss = -jnp.sum(log * target * (1 if per_class is None else per_class), axis)
        mean = jnp.sum(loss) / (x.size // x.shape[axis])
        return mean if reduction == 1 else _reduced(loss, reduction)
    loss, total = _nll(log, target, weight, reduction, ignore_index)
    if not label_smoothing:
        return loss
    counts = target != ignore_index
    smooth = -jnp.sum(log if per_class is None else log * per_class, axis)
    smooth = jnp.where(counts, smooth, 0)
    if reduction == 1:
        smooth = jnp.sum(smooth) / (jnp.sum(counts) if weight is None else total)
    elif reduction == 2:
        smooth = jnp.sum(smooth)
    return (1 - label_smoothing) * loss + label_smoothing / x.shape[axis] * smooth


@rule("aten.ctc_loss.IntList", "aten.ctc_loss.Tensor", "aten._ctc_loss.default")
def ctc_loss(*_: Any, **__: Any) -> Any:
    raise refuse("ctc_loss: compute it by optax.ctc_loss, outside of the model")
