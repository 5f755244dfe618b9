"""Activations, softmax and losses' pointwise parts. At a kink the gradient is torch's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.porting.rules import rule
from convert.porting.rules.promote import cast, category, refuse, wide


def _select(condition: Any, then: Any, otherwise: Any) -> Any:
    return jnp.where(condition, then, otherwise)


@rule("aten.relu6.default")
def relu6(x: Any) -> Any:
    return hardtanh(x, 0, 6)


@rule("aten.hardtanh.default")
def hardtanh(x: Any, min_val: Any = -1, max_val: Any = 1) -> Any:
    low, high = cast(min_val, x.dtype), cast(max_val, x.dtype)
    return _select(x <= low, low, _select(x >= high, high, x))


@rule("aten.leaky_relu.default")
def leaky_relu(x: Any, negative_slope: float = 0.01) -> Any:
    return _select(x > 0, x, x * cast(negative_slope, x.dtype))


@rule("aten.elu.default")
def elu(x: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Any:
    def f(x: Any) -> Any:
        low = alpha * scale * jnp.expm1(jnp.minimum(x, 0) * input_scale)
        return _select(x > 0, x * scale, low)

    return wide(f)(x)


@rule("aten.selu.default")
def selu(x: Any) -> Any:
    return elu(x, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


@rule("aten.celu.default")
def celu(x: Any, alpha: float = 1.0) -> Any:
    return elu(x, alpha, 1.0, 1.0 / alpha)


@rule("aten.gelu.default")
def gelu(x: Any, *, approximate: str = "none") -> Any:
    return wide(lambda x: jax.nn.gelu(x, approximate=approximate == "tanh"))(x)


@rule("aten.silu.default")
def silu(x: Any) -> Any:
    return wide(lambda x: x / (1 + jnp.exp(-x)) if category(x.dtype) == 3 else jax.nn.silu(x))(x)


@rule("aten.mish.default")
def mish(x: Any) -> Any:
    return wide(lambda x: x * jnp.tanh(jax.nn.softplus(x)))(x)


@rule("aten.hardswish.default")
def hardswish(x: Any) -> Any:
    return _select(x <= -3, 0, _select(x >= 3, x, x * (x + 3) / 6)).astype(x.dtype)


@rule("aten.hardsigmoid.default")
def hardsigmoid(x: Any) -> Any:
    zero, one = cast(0, x.dtype), cast(1, x.dtype)
    return _select(x <= -3, zero, _select(x >= 3, one, (x + 3) / 6))


@rule("aten.softplus.default")
def softplus(x: Any, beta: Any = 1, threshold: Any = 20) -> Any:
    def f(x: Any) -> Any:
        high = x * beta > threshold
        return _select(high, x, jnp.log1p(jnp.exp(_select(high, 0, x) * beta)) / beta)

    return wide(f)(x)


@rule("aten.log_sigmoid.default")
def log_sigmoid(x: Any) -> Any:
    return wide(jax.nn.log_sigmoid)(x)


@rule("aten.log_sigmoid_forward.default")
def log_sigmoid_forward(x: Any) -> Any:
    return log_sigmoid(x), jnp.exp(-jnp.abs(x))


@rule("aten.hardshrink.default")
def hardshrink(x: Any, lambd: Any = 0.5) -> Any:
    return _select((x >= -lambd) & (x <= lambd), cast(0, x.dtype), x)


@rule("aten.softshrink.default")
def softshrink(x: Any, lambd: Any = 0.5) -> Any:
    zero = x * 0
    return _select(x > lambd, x - lambd, _select(x < -lambd, x + lambd, zero))


@rule("aten.threshold.default")
def threshold(x: Any, threshold: Any, value: Any) -> Any:
    return _select(x <= threshold, cast(value, x.dtype), x)


@rule("aten.prelu.default", "aten._prelu_kernel.default")
def prelu(x: Any, weight: Any) -> Any:
    if weight.ndim == 1 and weight.size > 1:
        weight = weight.reshape(-1, *(1,) * (x.ndim - 2)) if x.ndim > 1 else weight
    elif weight.ndim == 1:
        weight = weight.reshape(())
    return _select(x > 0, x, weight * x)


@rule("aten.rrelu.default")
def rrelu(x: Any, lower: Any = 0.125, upper: Any = 1 / 3, training: bool = False) -> Any:
    if training:
        raise refuse("rrelu with training=True")
    return leaky_relu(x, (lower + upper) / 2)


@rule("aten.glu.default")
def glu(x: Any, dim: int = -1) -> Any:
    a, b = jnp.split(x, 2, axis=dim)
    return a * wide(jax.nn.sigmoid)(b)


def _softmax(x: Any, dim: int, dtype: Any, log: bool) -> Any:
    x = cast(x, x.dtype if dtype is None else dtype)
    if not x.ndim:
        dim = None  # type: ignore[assignment]
    return wide(jax.nn.log_softmax if log else jax.nn.softmax)(x, axis=dim)


def _empty_or(f: Any, x: Any, dim: int, dtype: Any) -> Any:
    if not x.size:
        return cast(x, x.dtype if dtype is None else dtype)
    return f()


@rule("aten.softmax.int", "aten.special_softmax.default")
def softmax(x: Any, dim: int, dtype: Any = None) -> Any:
    return _empty_or(lambda: _softmax(x, dim, dtype, False), x, dim, dtype)


@rule("aten.log_softmax.int", "aten.special_log_softmax.default")
def log_softmax(x: Any, dim: int, dtype: Any = None) -> Any:
    return _empty_or(lambda: _softmax(x, dim, dtype, True), x, dim, dtype)


@rule("aten._softmax.default")
def softmax_(x: Any, dim: int, half_to_float: bool = False) -> Any:
    return softmax(x, dim, np.float32 if half_to_float else None)


@rule("aten._log_softmax.default")
def log_softmax_(x: Any, dim: int, half_to_float: bool = False) -> Any:
    return log_softmax(x, dim, np.float32 if half_to_float else None)


@rule("aten._safe_softmax.default")
def safe_softmax(x: Any, dim: int, dtype: Any = None) -> Any:
    nothing = jnp.all(x == -jnp.inf, axis=dim, keepdims=True)
    return jnp.where(nothing, 0, softmax(jnp.where(nothing, 0, x), dim, dtype))


@rule("aten._masked_softmax.default")
def masked_softmax(x: Any, mask: Any, dim: int | None = None, mask_type: Any = None) -> Any:
    raise refuse("_masked_softmax, the nested tensors' softmax: run the model in train mode")
