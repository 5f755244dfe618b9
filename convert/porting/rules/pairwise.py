"""Functions of two and three tensors, element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy import special

from convert.porting.rules import rule, rules_of
from convert.porting.rules.promote import (
    cast,
    category,
    default_float,
    floats,
    is_array,
    opmath,
    result_type,
    together,
)

Function = Callable[..., Any]


# -- of two -------------------------------------------------------------------------------------


def _scaled(b: Any, alpha: Any, dtype: Any) -> Any:
    b = cast(b, dtype)
    return b if isinstance(alpha, int | float) and alpha == 1 else b * cast(alpha, dtype)


@rule("aten.add.Tensor", "aten.add.Scalar")
def add(a: Any, b: Any, alpha: Any = 1) -> Any:
    dtype = result_type(a, b)
    if dtype == np.bool_:
        return cast(a, dtype) | (cast(b, dtype) & bool(alpha))
    return cast(a, dtype) + _scaled(b, alpha, dtype)


@rule("aten.sub.Tensor", "aten.sub.Scalar", "aten.subtract.Tensor", "aten.subtract.Scalar")
def sub(a: Any, b: Any, alpha: Any = 1) -> Any:
    dtype = result_type(a, b)
    return cast(a, dtype) - _scaled(b, alpha, dtype)


@rule("aten.rsub.Tensor", "aten.rsub.Scalar")
def rsub(a: Any, b: Any, alpha: Any = 1) -> Any:
    return sub(b, a, alpha)


@rule("aten.mul.Tensor", "aten.mul.Scalar", "aten.multiply.Tensor", "aten.multiply.Scalar")
def mul(a: Any, b: Any) -> Any:
    a, b = together(a, b)
    return a & b if a.dtype == np.bool_ else a * b


@rule(
    "aten.div.Tensor",
    "aten.div.Scalar",
    "aten.divide.Tensor",
    "aten.divide.Scalar",
    "aten.true_divide.Tensor",
    "aten.true_divide.Scalar",
)
def div(a: Any, b: Any) -> Any:
    a, b = floats(a, b)
    return a / b


def _floor_of_quotient(a: Any, b: Any) -> Any:
    """torch's: exact remainder first, as Python's `//`; a division by zero gives a / b."""
    if category(a.dtype) < 2:
        return jnp.floor_divide(a, b)
    rest = lax.rem(a, b)
    quotient = (a - rest) / b
    quotient = jnp.where((rest != 0) & ((b < 0) != (rest < 0)), quotient - 1, quotient)
    whole = jnp.floor(quotient)
    whole = jnp.where(quotient - whole > 0.5, whole + 1, whole)
    zero = jnp.copysign(jnp.zeros((), a.dtype), a / b)
    return jnp.where(b == 0, a / b, jnp.where(quotient == 0, zero, whole))


def _16_bits_in_32(function: Function, a: Any, b: Any) -> Any:
    wider = opmath(a.dtype)
    a_wide, b_wide = jnp.broadcast_arrays(cast(a, wider), cast(b, wider))
    return cast(function(a_wide, b_wide), a.dtype)


@rule(
    "aten.div.Tensor_mode",
    "aten.div.Scalar_mode",
    "aten.divide.Tensor_mode",
    "aten.divide.Scalar_mode",
)
def div_mode(a: Any, b: Any, *, rounding_mode: str | None) -> Any:
    if rounding_mode is None:
        return div(a, b)
    if rounding_mode == "floor":
        return floor_divide(a, b)
    a, b = together(a, b)
    if category(a.dtype) < 2:
        return lax.div(*jnp.broadcast_arrays(a, b)) if category(a.dtype) else a
    return lax.stop_gradient(jnp.trunc(a / b))


@rule("aten.floor_divide.default", "aten.floor_divide.Scalar")
def floor_divide(a: Any, b: Any) -> Any:
    a, b = together(a, b)
    return lax.stop_gradient(_16_bits_in_32(_floor_of_quotient, a, b))


def _python_remainder(a: Any, b: Any) -> Any:
    rest = lax.rem(a, b)
    return jnp.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


@rule("aten.remainder.Tensor", "aten.remainder.Scalar", "aten.remainder.Scalar_Tensor")
def remainder(a: Any, b: Any) -> Any:
    a, b = together(a, b)
    return _16_bits_in_32(_python_remainder, a, b)


@rule("aten.fmod.Tensor", "aten.fmod.Scalar")
def fmod(a: Any, b: Any) -> Any:
    a, b = together(a, b)
    return _16_bits_in_32(lax.rem, a, b)


def _integer_power(a: Any, b: Any) -> Any:
    """A negative power is 0, but of 1 and -1."""
    sign = jnp.where(b % 2 == 0, 1, -1)
    inverse = jnp.where(a == 1, 1, jnp.where(a == -1, sign, 0))
    return jnp.where(b < 0, cast(inverse, a.dtype), jnp.power(a, jnp.maximum(b, 0)))


@rule("aten.pow.Tensor_Scalar", "aten.pow.Scalar", "aten.pow.Tensor_Tensor")
def power(a: Any, b: Any) -> Any:
    dtype = result_type(a, b)
    if not is_array(b) and is_array(a):
        if float(b.real) == b and float(b).is_integer() and abs(b) < 2**31 and category(dtype):
            return lax.integer_pow(cast(a, dtype), int(b)) if b else jnp.ones_like(a, dtype)
        if b == 0.5:
            return jnp.sqrt(cast(a, dtype))
    a, b = cast(a, dtype), cast(b, dtype)
    if category(dtype) == 1:
        return _integer_power(a, b)
    return _16_bits_in_32(jnp.power, a, b) if category(dtype) else a | ~b


@rule(
    "aten.float_power.Tensor_Tensor",
    "aten.float_power.Tensor_Scalar",
    "aten.float_power.Scalar",
)
def float_power(a: Any, b: Any) -> Any:
    dtype = np.complex128 if category(result_type(a, b)) == 3 else np.float64
    return power(cast(a, dtype), cast(b, dtype))


def _of_two_floats(function: Function) -> Function:
    def of_two(a: Any, b: Any) -> Any:
        a, b = floats(a, b)
        return _16_bits_in_32(function, a, b)

    return of_two


def logaddexp(a: Any, b: Any) -> Any:
    """Of complex numbers with the angle of the larger one, which JAX brings back to a turn."""
    if category(a.dtype) < 3:
        return jnp.logaddexp(a, b)
    swapped = a.real < b.real
    most, least = jnp.where(swapped, b, a), jnp.where(swapped, a, b)
    return most + jnp.log1p(jnp.exp(least - most))


def _zeta(x: Any, q: Any) -> Any:
    """At q = 0, -1, ... infinite for every x above 1, where JAX looks at whether x is even."""
    found = jnp.where((q <= 0) & (q == jnp.floor(q)) & (x > 1), jnp.inf, special.zeta(x, q))
    return jnp.where(x < 1, jnp.nan, found)


def _xlogy(x: Any, y: Any) -> Any:
    log = jnp.log(jnp.where(x == 0, 1, y))
    return jnp.where(jnp.isnan(y), y, x * log)


def _xlog1py(x: Any, y: Any) -> Any:
    log = jnp.log1p(jnp.where(x == 0, 0, y))
    return jnp.where(jnp.isnan(y), y, x * log)


rules_of(
    {
        "atan2": _of_two_floats(jnp.arctan2),
        "arctan2": _of_two_floats(jnp.arctan2),
        "hypot": _of_two_floats(jnp.hypot),
        "logaddexp": _of_two_floats(logaddexp),
        "logaddexp2": _of_two_floats(jnp.logaddexp2),
        "nextafter": _of_two_floats(jnp.nextafter),
        "gcd": lambda a, b: jnp.gcd(*together(a, b)),
        "lcm": lambda a, b: jnp.lcm(*together(a, b)),
        "special_gammainc": _of_two_floats(special.gammainc),
        "special_gammaincc": _of_two_floats(special.gammaincc),
        "igamma": _of_two_floats(special.gammainc),
        "igammac": _of_two_floats(special.gammaincc),
        "special_zeta": _of_two_floats(_zeta),
    }.items()
)
for _overload in ("Tensor", "Scalar_Self", "Scalar_Other"):
    rule(f"aten.xlogy.{_overload}")(_of_two_floats(_xlogy))
for _overload in ("default", "self_scalar", "other_scalar"):
    rule(f"aten.special_xlog1py.{_overload}")(_of_two_floats(_xlog1py))
    rule(f"aten.special_xlogy.{_overload}")(_of_two_floats(_xlogy))
for _overload in ("Tensor", "Scalar"):
    rule(f"aten.copysign.{_overload}")(_of_two_floats(jnp.copysign))


@rule("aten.heaviside.default")
def heaviside(a: Any, b: Any) -> Any:
    return jnp.where(a == 0, b, cast(a > 0, a.dtype))


def _comparison(function: Function) -> Function:
    def compare(a: Any, b: Any) -> Any:
        return function(*together(a, b))

    return compare


for _names, _function in {
    ("eq",): jnp.equal,
    ("ne", "not_equal"): jnp.not_equal,
    ("lt", "less"): jnp.less,
    ("le", "less_equal"): jnp.less_equal,
    ("gt", "greater"): jnp.greater,
    ("ge", "greater_equal"): jnp.greater_equal,
}.items():
    _compare = _comparison(_function)
    rules_of([(n, _compare) for n in _names], "Tensor", "Scalar")

for _name, _function in {
    "logical_and": jnp.logical_and,
    "logical_or": jnp.logical_or,
    "logical_xor": jnp.logical_xor,
}.items():
    rule(f"aten.{_name}.default")(lambda a, b, f=_function: f(cast(a, np.bool_), cast(b, np.bool_)))

for _name, _function in {
    "bitwise_and": jnp.bitwise_and,
    "bitwise_or": jnp.bitwise_or,
    "bitwise_xor": jnp.bitwise_xor,
}.items():
    rules_of([(_name, _comparison(_function))], "Tensor", "Scalar", "Scalar_Tensor")
    _dunder = f"__{_name.removeprefix('bitwise_')}__"
    rules_of([(_dunder, _comparison(_function))], "Tensor", "Scalar")


@rule(
    "aten.bitwise_left_shift.Tensor",
    "aten.bitwise_left_shift.Tensor_Scalar",
    "aten.bitwise_left_shift.Scalar_Tensor",
    "aten.__lshift__.Tensor",
    "aten.__lshift__.Scalar",
)
def left_shift(a: Any, b: Any) -> Any:
    a, b = together(a, b)
    bits = np.iinfo(a.dtype).bits
    inside = (b >= 0) & (b < bits)
    return jnp.where(inside, jnp.left_shift(a, jnp.where(inside, b, 0)), 0)


@rule(
    "aten.bitwise_right_shift.Tensor",
    "aten.bitwise_right_shift.Tensor_Scalar",
    "aten.bitwise_right_shift.Scalar_Tensor",
    "aten.__rshift__.Tensor",
    "aten.__rshift__.Scalar",
)
def right_shift(a: Any, b: Any) -> Any:
    a, b = together(a, b)
    last = np.iinfo(a.dtype).bits - 1
    return jnp.right_shift(a, jnp.where((b < 0) | (b > last), cast(last, b.dtype), b))


@rule("aten.maximum.default", "aten.max.other")
def maximum(a: Any, b: Any) -> Any:
    return jnp.maximum(*together(a, b))


@rule("aten.minimum.default", "aten.min.other")
def minimum(a: Any, b: Any) -> Any:
    return jnp.minimum(*together(a, b))


@rule("aten.fmax.default")
def fmax(a: Any, b: Any) -> Any:
    a, b = together(a, b)
    return a | b if a.dtype == np.bool_ else jnp.where((a >= b) | jnp.isnan(b), a, b)


@rule("aten.fmin.default")
def fmin(a: Any, b: Any) -> Any:
    a, b = together(a, b)
    return a & b if a.dtype == np.bool_ else jnp.where((a <= b) | jnp.isnan(b), a, b)


def _bounded(x: Any, low: Any, high: Any, dtype: Any) -> Any:
    """At a bound the gradient is x's, as torch has it; a NaN stays, or comes from a bound."""
    x = cast(x, dtype)
    if low is not None:
        low = cast(low, dtype)
        x = jnp.where((x < low) | jnp.isnan(low), low, x)
    if high is not None:
        high = cast(high, dtype)
        x = jnp.where((x > high) | jnp.isnan(high), high, x)
    return x


@rule("aten.clamp.default", "aten.clamp.Tensor", "aten.clip.default", "aten.clip.Tensor")
def clamp(x: Any, min: Any = None, max: Any = None) -> Any:
    return _bounded(x, min, max, result_type(x, min, max))


@rule("aten.clamp_min.default", "aten.clamp_min.Tensor")
def clamp_min(x: Any, min: Any) -> Any:
    return clamp(x, min)


@rule("aten.clamp_max.default", "aten.clamp_max.Tensor")
def clamp_max(x: Any, max: Any) -> Any:
    return clamp(x, None, max)


@rule("aten.isclose.default")
def isclose(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> Any:
    if category(a.dtype) < 2:
        a, b = cast(a, np.float64), cast(b, np.float64)
    return jnp.isclose(a, b, rtol, atol, equal_nan)


@rule("aten.ldexp.Tensor")
def ldexp(a: Any, b: Any) -> Any:
    dtype = result_type(a, b)
    return cast(mul(a, power(2.0, b)), dtype if category(dtype) > 1 else default_float())


# -- of three -----------------------------------------------------------------------------------


@rule("aten.where.self", "aten.where.ScalarSelf", "aten.where.ScalarOther", "aten.where.Scalar")
def where(condition: Any, a: Any, b: Any) -> Any:
    a, b = together(a, b)
    return jnp.where(cast(condition, np.bool_), a, b)


@rule("aten.lerp.Scalar", "aten.lerp.Tensor")
def lerp(a: Any, b: Any, weight: Any) -> Any:
    wider = opmath(a.dtype)
    x, y, w = cast(a, wider), cast(b, wider), cast(weight, wider)
    near = jnp.abs(w) < 0.5
    return cast(jnp.where(near, x + w * (y - x), y - (y - x) * (1 - w)), a.dtype)


@rule("aten.addcmul.default")
def addcmul(x: Any, a: Any, b: Any, *, value: Any = 1) -> Any:
    x, a, b = together(x, a, b)
    return x + cast(value, x.dtype) * a * b


@rule("aten.addcdiv.default")
def addcdiv(x: Any, a: Any, b: Any, *, value: Any = 1) -> Any:
    x, a, b = together(x, a, b)
    return x + cast(value, x.dtype) * (a / b)
