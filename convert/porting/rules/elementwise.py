"""Functions of one tensor, element by element, and changes of dtype."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy import special

from convert.porting.rules import RULES, rule, rules_of
from convert.porting.rules.promote import (
    cast,
    category,
    floats,
    refuse,
    wide,
)

Function = Callable[..., Any]


# -- of one tensor ------------------------------------------------------------------------------


def _of_float(function: Function) -> Function:
    """A function of floats: integers become float32; 16 bits are computed in 32."""
    return lambda x: wide(function)(floats(x)[0])


def _square_root_of_one_minus(x: Any) -> Any:
    return jnp.sqrt((1 - x) * (1 + x))


@jax.custom_jvp
def _digamma(x: Any) -> Any:
    pole = jnp.copysign(jnp.asarray(jnp.inf, x.dtype), -x)
    return jnp.where(x == 0, pole, special.digamma(jnp.where(x == 0, 1, x)))


@_digamma.defjvp
def _digamma_jvp(primals: Any, tangents: Any) -> Any:
    return _digamma(primals[0]), polygamma(1, primals[0]) * tangents[0]


@jax.custom_jvp
def _i0(x: Any) -> Any:
    return special.i0(x)


@_i0.defjvp
def _i0_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (t,) = primals, tangents
    return special.i0(x), special.i1(x) * t  # JAX's own gradient is 1 at 0


@jax.custom_jvp
def _erfinv(x: Any) -> Any:
    return special.erfinv(x)


@_erfinv.defjvp
def _erfinv_jvp(primals: Any, tangents: Any) -> Any:
    y = special.erfinv(primals[0])
    return y, tangents[0] * (math.sqrt(math.pi) / 2) * jnp.exp(y * y)


_FLOAT_FUNCTIONS: dict[str, Function] = {
    "sqrt": jnp.sqrt,
    "rsqrt": lambda x: lax.rsqrt(x) if category(x.dtype) == 2 else 1 / jnp.sqrt(x),
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "special_exp2": jnp.exp2,
    "expm1": jnp.expm1,
    "special_expm1": jnp.expm1,
    "log": jnp.log,
    "log2": lambda x: jnp.log2(x) if category(x.dtype) == 2 else jnp.log(x) / math.log(2),
    "log10": lambda x: jnp.log10(x) if category(x.dtype) == 2 else jnp.log(x) / math.log(10),
    "log1p": jnp.log1p,
    "special_log1p": jnp.log1p,
    "sin": jnp.sin,
    "cos": jnp.cos,
    "tan": jnp.tan,
    "asin": jnp.arcsin,
    "acos": jnp.arccos,
    "atan": jnp.arctan,
    "sinh": jnp.sinh,
    "cosh": jnp.cosh,
    "tanh": jnp.tanh,
    "asinh": jnp.arcsinh,
    "acosh": jnp.arccosh,
    "atanh": jnp.arctanh,
    "sigmoid": lambda x: jax.nn.sigmoid(x) if category(x.dtype) == 2 else 1 / (1 + jnp.exp(-x)),
    "erf": special.erf,
    "erfc": special.erfc,
    "erfinv": _erfinv,
    "lgamma": special.gammaln,
    "digamma": _digamma,
    "i0": _i0,
    "special_i0": _i0,
    "special_i0e": special.i0e,
    "special_i1": special.i1,
    "special_i1e": special.i1e,
    "sinc": jnp.sinc,
    "special_sinc": jnp.sinc,
    "special_ndtr": special.ndtr,
    "special_ndtri": special.ndtri,
    "special_log_ndtr": special.log_ndtr,
    "special_entr": special.entr,
    "reciprocal": lambda x: 1 / x,
    "deg2rad": lambda x: x * (math.pi / 180),
    "rad2deg": lambda x: x * (180 / math.pi),
}
rules_of((name, _of_float(f)) for name, f in _FLOAT_FUNCTIONS.items())
for _alias, _name in {
    "special_erf": "erf",
    "special_erfc": "erfc",
    "special_erfinv": "erfinv",
    "special_expit": "sigmoid",
    "special_gammaln": "lgamma",
    "special_digamma": "digamma",
    "special_psi": "digamma",
    "arcsin": "asin",
    "arccos": "acos",
    "arctan": "atan",
    "arcsinh": "asinh",
    "arccosh": "acosh",
    "arctanh": "atanh",
}.items():
    rule(f"aten.{_alias}.default")(RULES[f"aten.{_name}.default"].function)


def _unless_integer(function: Function) -> Function:
    """A function that leaves integers as they are."""
    return lambda x: function(x) if category(x.dtype) >= 2 else x


@jax.custom_jvp
def absolute(x: Any) -> Any:
    """JAX's gradient at 0 is 1, torch's 0."""
    return jnp.abs(x)


@absolute.defjvp
def _absolute_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (t,) = primals, tangents
    return jnp.abs(x), jnp.real(jnp.conj(jnp.sign(x)) * t)


def _sgn(x: Any) -> Any:
    """Of a NaN it is 0."""
    if category(x.dtype) != 2:
        return x if x.dtype == np.bool_ else jnp.sign(x)
    return jnp.where(jnp.isnan(x), cast(0, x.dtype), jnp.sign(x))


rules_of(
    {
        "abs": lambda x: x if x.dtype == np.bool_ else absolute(x),
        "absolute": lambda x: x if x.dtype == np.bool_ else absolute(x),
        "neg": jnp.negative,
        "negative": jnp.negative,
        "positive": lambda x: x,
        "ceil": _unless_integer(jnp.ceil),
        "floor": _unless_integer(jnp.floor),
        "round": _unless_integer(jnp.round),
        "trunc": _unless_integer(jnp.trunc),
        "fix": _unless_integer(jnp.trunc),
        "frac": lambda x: x - lax.stop_gradient(jnp.trunc(x)),
        "sign": _sgn,
        "sgn": _sgn,
        "square": lambda x: x * x if x.dtype != np.bool_ else cast(x, np.int64),
        "isnan": jnp.isnan,
        "isinf": jnp.isinf,
        "isfinite": jnp.isfinite,
        "isposinf": lambda x: x == np.inf if category(x.dtype) == 2 else jnp.zeros(x.shape, bool),
        "isneginf": lambda x: x == -np.inf if category(x.dtype) == 2 else jnp.zeros(x.shape, bool),
        "signbit": lambda x: jnp.zeros(x.shape, bool) if x.dtype == np.bool_ else jnp.signbit(x),
        "logical_not": lambda x: x == 0,
        "bitwise_not": lambda x: ~x,
        "isreal": lambda x: jnp.imag(x) == 0,
        "relu": lambda x: jnp.maximum(x, 0) if category(x.dtype) < 2 else jax.nn.relu(x),
    }.items()
)


@rule("aten.round.decimals", "aten.special_round.default")
def round_decimals(x: Any, *, decimals: int = 0) -> Any:
    if category(x.dtype) < 2:
        return x
    ten = 10.0 ** abs(decimals)
    if decimals < 0:
        return wide(lambda x: jnp.round(x / ten) * ten)(x)
    return wide(lambda x: jnp.round(x * ten) / ten)(x)


@rule("aten.logit.default", "aten.special_logit.default")
def logit(x: Any, eps: float | None = None) -> Any:
    (x,) = floats(x)
    if eps is not None:
        x = jnp.where(x < eps, eps, jnp.where(x > 1 - eps, 1 - eps, x))
    return jnp.log(x / (1 - x))


@rule("aten.nan_to_num.default")
def nan_to_num(
    x: Any, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
) -> Any:
    if category(x.dtype) < 2:
        return x
    return jnp.nan_to_num(x, nan=nan or 0.0, posinf=posinf, neginf=neginf)


_POLES = 64  # of negative numbers, where polygamma is right


@rule("aten.polygamma.default")
def polygamma(n: int, x: Any) -> Any:
    (x,) = floats(x)
    if n == 0:
        return _digamma(x)
    # JAX's own is off by 1e-2 near the poles: it is taken at x > 0 alone, and brought back by
    # psi(x) = psi(x + 1) - (-1)^n n! / x^(n + 1).
    k = jnp.arange(_POLES, dtype=x.dtype)
    below = x[..., None] + k
    steps = jnp.where(below <= 0, 1.0, jnp.zeros((), x.dtype))
    terms = steps * jnp.where(below <= 0, below, 1.0) ** -(n + 1)
    above = special.polygamma(jnp.full(x.shape, n), x + jnp.sum(steps, axis=-1))
    return above - (-1) ** n * math.factorial(n) * jnp.sum(terms, axis=-1)


@rule("aten.special_polygamma.default")
def special_polygamma(n: int, x: Any) -> Any:
    return polygamma(n, x)


@rule("aten.mvlgamma.default", "aten.special_multigammaln.default")
def mvlgamma(x: Any, p: int) -> Any:
    return special.multigammaln(floats(x)[0], p)


@rule("aten.frexp.Tensor")
def frexp(x: Any) -> Any:
    mantissa, exponent = jnp.frexp(x)
    return mantissa, cast(exponent, np.int32)


# -- dtypes -------------------------------------------------------------------------------------


@rule("aten._to_copy.default")
def to_copy(x: Any, *, dtype: Any = None) -> Any:
    return x if dtype is None else cast(x, dtype)


@rule("aten.to.dtype", "aten.to.dtype_layout", "aten.to.device")
def to_dtype(x: Any, *args: Any, dtype: Any = None, copy: bool = False) -> Any:
    dtypes = [a for a in args if isinstance(a, np.dtype | type)]
    dtype = dtype if dtype is not None else dtypes[0] if dtypes else None
    return x if dtype is None else cast(x, dtype)


@rule("prims.convert_element_type.default")
def convert_element_type(x: Any, dtype: Any) -> Any:
    return cast(x, dtype)


@rule("aten.type_as.default", "aten.to.other")
def type_as(x: Any, other: Any, *_: Any, **__: Any) -> Any:
    return cast(x, other.dtype)


for _name, _dtype in {
    "Byte": np.uint8,
    "Char": np.int8,
    "Short": np.int16,
    "Int": np.int32,
    "Long": np.int64,
    "Half": np.float16,
    "Float": np.float32,
    "Double": np.float64,
}.items():
    rule(f"aten._cast_{_name}.default")(lambda x, _=False, d=_dtype: cast(x, d))


@rule("aten.view.dtype")
def view_dtype(x: Any, dtype: Any) -> Any:
    if x.dtype == np.bool_ or dtype == np.bool_ or category(x.dtype) == 3 or category(dtype) == 3:
        raise refuse(f"a view of {x.dtype} as {np.dtype(dtype)}")
    sizes = x.dtype.itemsize, np.dtype(dtype).itemsize
    if sizes[0] < sizes[1]:
        x = x.reshape(*x.shape[:-1], -1, sizes[1] // sizes[0])
    y = lax.bitcast_convert_type(x, dtype)
    return y.reshape(*x.shape[:-1], -1) if sizes[0] > sizes[1] else y


# What gives its argument: JAX's arrays need no copies.
COPIES = (
    "aten.clone.default",
    "aten.contiguous.default",
    "aten.alias.default",
    "aten.lift_fresh_copy.default",
    "aten.lift_fresh.default",
    "aten.lift.default",
    "aten.resolve_conj.default",
    "aten.resolve_neg.default",
    "aten.alias_copy.default",
)


@rule(*COPIES)
def identity(x: Any) -> Any:
    return x


@rule("aten.detach.default", "aten.detach_copy.default", "aten.data.default")
def detach(x: Any) -> Any:
    return lax.stop_gradient(x)
