"""Activations, softmax, flattening: functions of one input, written as such."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from convert.porting.rendering.constructor import LayerText, written
from convert.porting.rendering.renderers import (
    JAX,
    JNP,
    View,
    computed,
    is_of,
    made,
    options,
    renders,
)

_NAME = re.compile(r"[\w.]+")


def function(callee: str, x: str, /, _defaults: tuple[Any, ...] = (), *values: Any) -> str:
    """`callee(x, ...)`; values that are its defaults are not written."""
    shown = () if values == _defaults else values
    return f"{callee}({', '.join([x, *(written(v) for v in shown)])})"


def _plain(callee: str) -> Callable[[Any, View], LayerText | None]:
    line = JNP if callee.startswith("jnp.") else JAX
    return lambda module, view: computed(lambda x: f"{callee}({x})", line)


for _torch, _jax in {
    "ReLU": "jax.nn.relu",
    "ReLU6": "jax.nn.relu6",
    "SiLU": "jax.nn.silu",
    "Mish": "jax.nn.mish",
    "Tanh": "jnp.tanh",
    "Sigmoid": "jax.nn.sigmoid",
    "LogSigmoid": "jax.nn.log_sigmoid",
    "Softsign": "jax.nn.soft_sign",
    "SELU": "jax.nn.selu",
    "Hardswish": "jax.nn.hard_silu",
    "Hardsigmoid": "jax.nn.hard_sigmoid",
}.items():
    renders(_torch)(_plain(_jax))


@renders("GELU")
def gelu(module: Any, view: View) -> LayerText | None:
    tanh = module.approximate == "tanh"
    return computed(lambda x: f"jax.nn.gelu({x}, approximate={tanh})", JAX)


@renders("LeakyReLU")
def leaky_relu(module: Any, view: View) -> LayerText | None:
    """At exactly 0 the gradient is 1 in JAX, and the slope in torch."""
    slope = module.negative_slope
    return computed(lambda x: function("jax.nn.leaky_relu", x, (0.01,), slope), JAX)


@renders("RReLU")
def rrelu(module: Any, view: View) -> LayerText | None:
    if view.training:
        return None
    slope = (module.lower + module.upper) / 2
    return computed(lambda x: function("jax.nn.leaky_relu", x, (0.01,), slope), JAX)


@renders("ELU", "CELU")
def elu(module: Any, view: View) -> LayerText | None:
    name = (is_of(module, "ELU", "CELU") or "").lower()
    return computed(lambda x: function(f"jax.nn.{name}", x, (1.0,), module.alpha), JAX)


@renders("Hardtanh")
def hardtanh(module: Any, view: View) -> LayerText | None:
    return computed(lambda x: function("jnp.clip", x, (), module.min_val, module.max_val), JNP)


@renders("Softplus")
def softplus(module: Any, view: View) -> LayerText | None:
    values = float(module.beta), float(module.threshold)
    line = "from zoo.nn.layers_flax import softplus"
    return computed(lambda x: function("softplus", x, (1.0, 20.0), *values), line)


def _of_name(pattern: str, *imports: str) -> LayerText:
    """A text that holds its argument several times."""
    return computed(lambda x: pattern.format(x=x) if _NAME.fullmatch(x) else None, *imports)


@renders("Tanhshrink")
def tanhshrink(module: Any, view: View) -> LayerText | None:
    return _of_name("{x} - jnp.tanh({x})", JNP)


@renders("Threshold")
def threshold(module: Any, view: View) -> LayerText | None:
    below, value = module.threshold, module.value
    return _of_name(f"jnp.where({{x}} > {written(below)}, {{x}}, {written(value)})", JNP)


@renders("Hardshrink")
def hardshrink(module: Any, view: View) -> LayerText | None:
    return _of_name(f"jnp.where(jnp.abs({{x}}) > {written(module.lambd)}, {{x}}, 0)", JNP)


@renders("Softshrink")
def softshrink(module: Any, view: View) -> LayerText | None:
    width = written(module.lambd)
    return _of_name(f"{{x}} - jnp.clip({{x}}, -{width}, {width})", JNP)


@renders("PReLU")
def prelu(module: Any, view: View) -> LayerText | None:
    n = module.num_parameters
    where = "layers_flax" if view.last or n == 1 else "channels_first_flax"
    return made("PReLU", where, (n,) if n > 1 else (), options(module), {})


# -- with an axis -------------------------------------------------------------------------------


def axis_in(view: View, dim: int) -> int | None:
    """Where an axis of torch's is; None: it depends on how many there are."""
    if not view.last or dim == 0:
        return dim
    if dim < 0:
        return None
    return -1 if dim == 1 else dim - 1


def _along(
    callee: str, dim: int | None, view: View, default: int | None = None
) -> LayerText | None:
    axis = None if dim is None else axis_in(view, dim)
    if axis is None:
        return None
    more = "" if axis == default else f", axis={axis}"
    return computed(lambda x: f"{callee}({x}{more})", JAX)


@renders("Softmax")
def softmax(module: Any, view: View) -> LayerText | None:
    """Without a dim, torch guesses one from the rank."""
    return _along("jax.nn.softmax", module.dim, view)


@renders("LogSoftmax")
def log_softmax(module: Any, view: View) -> LayerText | None:
    return _along("jax.nn.log_softmax", module.dim, view)


@renders("GLU")
def glu(module: Any, view: View) -> LayerText | None:
    return _along("jax.nn.glu", module.dim, view, default=-1)


@renders("Softmax2d")
def softmax2d(module: Any, view: View) -> LayerText | None:
    axis = -1 if view.last else -3
    return computed(lambda x: f"jax.nn.softmax({x}, axis={axis})", JAX)


@renders("Softmin")
def softmin(module: Any, view: View) -> LayerText | None:
    axis = None if module.dim is None else axis_in(view, module.dim)
    if axis is None:
        return None
    return computed(
        lambda x: f"jax.nn.softmax(-{x if _NAME.fullmatch(x) else f'({x})'}, axis={axis})", JAX
    )


@renders("Flatten")
def flatten(module: Any, view: View) -> LayerText | None:
    first, last = module.start_dim, module.end_dim
    if view.last:
        line = "from zoo.nn.pool_flax import flatten"
        return computed(lambda x: f"flatten({x})", line) if (first, last) == (1, -1) else None

    def text(x: str) -> str | None:
        if (first, last) == (1, -1) and _NAME.fullmatch(x):
            return f"{x}.reshape({x}.shape[0], -1)"
        if last == -1:
            return f"jax.lax.collapse({x}, {first})"
        return f"jax.lax.collapse({x}, {first}, {last + 1})" if first >= 0 else None

    return computed(text, JAX)


@renders("Unflatten")
def unflatten(module: Any, view: View) -> LayerText | None:
    sizes, dim = module.unflattened_size, module.dim
    if view.last or not all(isinstance(n, int) for n in sizes):  # names of axes are pairs
        return None
    inner = ", ".join(map(str, sizes))
    if dim == -1:
        return _of_name(f"{{x}}.reshape(*{{x}}.shape[:-1], {inner})")
    if dim < 0:
        return _of_name(f"{{x}}.reshape(*{{x}}.shape[:{dim}], {inner}, *{{x}}.shape[{dim + 1}:])")
    before = ", ".join(f"{{x}}.shape[{i}]" for i in range(dim))
    if not dim:
        return _of_name(f"{{x}}.reshape({inner}, *{{x}}.shape[1:])")
    return _of_name(f"{{x}}.reshape({before}, {inner}, *{{x}}.shape[{dim + 1}:])")
