"""Activations and softmax."""

from __future__ import annotations

from typing import Any

from convert.porting.rendering.operands import Operand
from convert.porting.rendering.templates import template
from convert.porting.rendering.templates.writing import cast, dtype_name, kind, number

_PLAIN = {
    "silu": "jax.nn.silu({x})",
    "mish": "jax.nn.mish({x})",
    "relu6": "jax.nn.relu6({x})",
    "hardswish": "jax.nn.hard_swish({x})",
    "hardsigmoid": "jax.nn.hard_sigmoid({x})",
    "selu": "jax.nn.selu({x})",
    "log_sigmoid": "jax.nn.log_sigmoid({x})",
}


def _of_real(text: str) -> Any:
    return lambda x: text.format(x=x) if kind(x) == 2 else None


for _name, _text in _PLAIN.items():
    template(f"aten.{_name}.default")(_of_real(_text))


@template("aten.relu.default")
def relu(x: Operand) -> str | None:
    return f"jax.nn.relu({x})" if kind(x) == 2 else f"jnp.maximum({x}, 0)" if kind(x) else None


@template("aten.gelu.default")
def gelu(x: Operand, *, approximate: str = "none") -> str | None:
    return f"jax.nn.gelu({x}, approximate={approximate == 'tanh'})" if kind(x) == 2 else None


@template("aten.leaky_relu.default")
def leaky_relu(x: Operand, negative_slope: float = 0.01) -> str | None:
    slope = number(negative_slope)
    return f"jax.nn.leaky_relu({x}, negative_slope={slope})" if kind(x) == 2 else None


@template("aten.elu.default")
def elu(x: Operand, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> str | None:
    if kind(x) != 2 or scale != 1 or input_scale != 1:
        return None
    return f"jax.nn.elu({x})" if alpha == 1 else f"jax.nn.elu({x}, alpha={number(alpha)})"


@template("aten.celu.default")
def celu(x: Operand, alpha: float = 1.0) -> str | None:
    if kind(x) != 2:
        return None
    return f"jax.nn.celu({x})" if alpha == 1 else f"jax.nn.celu({x}, alpha={number(alpha)})"


@template("aten.hardtanh.default")
def hardtanh(x: Operand, min_val: Any = -1, max_val: Any = 1) -> str | None:
    low, high = number(min_val, x.dtype), number(max_val, x.dtype)
    return f"jnp.clip({x}, {low}, {high})" if kind(x) == 2 and low and high else None


@template("aten.softplus.default")
def softplus(x: Operand, beta: Any = 1, threshold: Any = 20) -> str | None:
    """torch's is the identity above a threshold, which float64 can see."""
    if kind(x) != 2 or beta != 1:
        return None
    return f"jnp.where({x} > {number(threshold)}, {x}, jax.nn.softplus({x}))"


@template("aten.threshold.default")
def threshold(x: Operand, threshold: Any, value: Any) -> str | None:
    filled, bound = number(value, x.dtype), number(threshold, x.dtype)
    return f"jnp.where({x} <= {bound}, {filled}, {x})" if kind(x) == 2 and filled else None


@template("aten.hardshrink.default")
def hardshrink(x: Operand, lambd: Any = 0.5) -> str | None:
    return f"jnp.where(jnp.abs({x}) <= {number(lambd)}, 0, {x})" if kind(x) == 2 else None


@template("aten.softshrink.default")
def softshrink(x: Operand, lambd: Any = 0.5) -> str | None:
    if kind(x) != 2:
        return None
    return f"jnp.sign({x}) * jnp.maximum(jnp.abs({x}) - {number(lambd)}, 0)"


@template("aten.prelu.default", "aten._prelu_kernel.default")
def prelu(x: Operand, weight: Operand) -> str | None:
    if x.dtype != weight.dtype or kind(x) != 2:
        return None
    slope = str(weight)
    if len(weight.shape) == 1 and weight.shape[0] != 1 and len(x.shape) > 2:
        slope = f"{weight}[:{', None' * (len(x.shape) - 2)}]"
    return f"jnp.where({x} > 0, {x}, {slope} * {x})"


@template("aten.glu.default")
def glu(x: Operand, dim: int = -1) -> str | None:
    return f"jax.nn.glu({x}, axis={dim})" if kind(x) == 2 else None


def _softmax(name: str, x: Operand, dim: int, dtype: Any) -> str | None:
    """In the dtype that it is asked for; a half's softmax torch computes in float32."""
    if not x.shape or 0 in x.shape or kind(dtype_name(dtype, x.dtype)) != 2:
        return None
    return f"jax.nn.{name}({cast(x, dtype_name(dtype, x.dtype))}, axis={dim})"


@template("aten.softmax.int", "aten.special_softmax.default")
def softmax(x: Operand, dim: int, dtype: Any = None) -> str | None:
    return _softmax("softmax", x, dim, dtype)


@template("aten.log_softmax.int", "aten.special_log_softmax.default")
def log_softmax(x: Operand, dim: int, dtype: Any = None) -> str | None:
    return _softmax("log_softmax", x, dim, dtype)


@template("aten._softmax.default")
def softmax_of(x: Operand, dim: int, half_to_float: bool = False) -> str | None:
    return _softmax("softmax", x, dim, "float32" if half_to_float else None)


@template("aten._log_softmax.default")
def log_softmax_of(x: Operand, dim: int, half_to_float: bool = False) -> str | None:
    return _softmax("log_softmax", x, dim, "float32" if half_to_float else None)
