"""Arithmetic, comparisons, functions of floats: element by element."""

from __future__ import annotations

from typing import Any

from convert.porting.rendering.operands import Operand
from convert.porting.rendering.templates import template
from convert.porting.rendering.templates.writing import (
    cast,
    combined,
    common,
    dtype_text,
    floats,
    in_dtype,
    kind,
    number,
    together,
)

# -- arithmetic ---------------------------------------------------------------------------------


def _scaled(b: Any, alpha: Any, dtype: str) -> Any:
    """The second part of a sum, times alpha; None where it cannot be written."""
    if alpha == 1:
        return b
    if not isinstance(b, Operand) or kind(dtype) == 0:
        return None
    factor = number(alpha, dtype)
    return factor and Operand(f"{factor} * {cast(b, dtype)}", type(b.type)(b.shape, dtype))


@template("aten.add.Tensor", "aten.add.Scalar")
def add(a: Any, b: Any, alpha: Any = 1) -> str | None:
    if type(b) is int and b == 0 and kind(a) != 0:
        return str(a.text)
    b = _scaled(b, alpha, common(a, b))
    text = "{} | {}" if kind(common(a, b)) == 0 else "{} + {}"
    return None if b is None else combined(text, a, b)


@template("aten.sub.Tensor", "aten.sub.Scalar", "aten.subtract.Tensor", "aten.subtract.Scalar")
def sub(a: Any, b: Any, alpha: Any = 1) -> str | None:
    b = _scaled(b, alpha, common(a, b))
    return None if b is None else combined("{} - {}", a, b)


@template("aten.rsub.Tensor", "aten.rsub.Scalar")
def rsub(a: Any, b: Any, alpha: Any = 1) -> str | None:
    return sub(b, a, alpha)


@template("aten.mul.Tensor", "aten.mul.Scalar", "aten.multiply.Tensor", "aten.multiply.Scalar")
def mul(a: Any, b: Any) -> str | None:
    return combined("{} & {}" if kind(common(a, b)) == 0 else "{} * {}", a, b)


@template(
    "aten.div.Tensor",
    "aten.div.Scalar",
    "aten.divide.Tensor",
    "aten.divide.Scalar",
    "aten.true_divide.Tensor",
    "aten.true_divide.Scalar",
)
def div(a: Any, b: Any) -> str | None:
    return combined("{} / {}", a, b, floating=True)


def _of_integers(a: Any, b: Any, symbol: str) -> str | None:
    """An operator that floats have another of: torch's treats zeros and roundings otherwise."""
    if kind(common(a, b)) != 1:
        return None
    return combined(f"{{}} {symbol} {{}}", a, b)


@template("aten.floor_divide.default", "aten.floor_divide.Scalar")
def floor_divide(a: Any, b: Any) -> str | None:
    return _of_integers(a, b, "//")


@template("aten.remainder.Tensor", "aten.remainder.Scalar", "aten.remainder.Scalar_Tensor")
def remainder(a: Any, b: Any) -> str | None:
    return _of_integers(a, b, "%")


@template(
    "aten.div.Tensor_mode",
    "aten.div.Scalar_mode",
    "aten.divide.Tensor_mode",
    "aten.divide.Scalar_mode",
)
def div_mode(a: Any, b: Any, *, rounding_mode: str | None) -> str | None:
    if rounding_mode is None:
        return div(a, b)
    if rounding_mode == "floor":
        return floor_divide(a, b)
    return combined("jnp.trunc({} / {})", a, b) if kind(common(a, b)) == 2 else None


@template("aten.pow.Tensor_Scalar")
def pow_scalar(x: Operand, exponent: Any) -> str | None:
    dtype = common(x, exponent)
    if isinstance(exponent, complex) or kind(dtype) not in (1, 2):
        return None
    base = cast(x, dtype)
    if exponent == 0.5:
        return f"jnp.sqrt({base})"
    if isinstance(exponent, float) and exponent.is_integer() and abs(exponent) < 2**31:
        exponent = int(exponent)
    if exponent == 0 or (kind(dtype) == 1 and exponent < 0):
        return None
    return f"{base} ** {number(exponent)}"


@template("aten.pow.Tensor_Tensor", "aten.pow.Scalar")
def power(a: Any, b: Any) -> str | None:
    return combined("jnp.power({}, {})", a, b) if kind(common(a, b)) == 2 else None


@template("aten.maximum.default", "aten.max.other")
def maximum(a: Operand, b: Operand) -> str | None:
    return combined("jnp.maximum({}, {})", a, b)


@template("aten.minimum.default", "aten.min.other")
def minimum(a: Operand, b: Operand) -> str | None:
    return combined("jnp.minimum({}, {})", a, b)


def _nan(bound: Any) -> bool:
    return isinstance(bound, float) and bound != bound


@template("aten.clamp.default", "aten.clamp.Tensor", "aten.clip.default", "aten.clip.Tensor")
def clamp(x: Operand, min: Any = None, max: Any = None) -> str | None:
    given = [v for v in (x, min, max) if v is not None]
    parts = None if _nan(min) or _nan(max) else together(*given)
    if parts is None:
        return None
    if min is None or max is None:
        return f"jnp.{'minimum' if min is None else 'maximum'}({', '.join(parts)})"
    return f"jnp.clip({', '.join(parts)})"


@template("aten.clamp_min.default", "aten.clamp_min.Tensor")
def clamp_min(x: Operand, min: Any) -> str | None:
    return clamp(x, min)


@template("aten.clamp_max.default", "aten.clamp_max.Tensor")
def clamp_max(x: Operand, max: Any) -> str | None:
    return clamp(x, None, max)


@template("aten.addcmul.default")
def addcmul(x: Operand, a: Operand, b: Operand, *, value: Any = 1) -> str | None:
    return _third(x, a, b, value, "*")


@template("aten.addcdiv.default")
def addcdiv(x: Operand, a: Operand, b: Operand, *, value: Any = 1) -> str | None:
    return _third(x, a, b, value, "/") if kind(common(x, a, b)) == 2 else None


def _third(x: Operand, a: Operand, b: Operand, value: Any, symbol: str) -> str | None:
    if not x.dtype == a.dtype == b.dtype or kind(x) == 0:
        return None
    factor = number(value, x.dtype)
    if factor is None:
        return None
    factor = "" if value == 1 else f"{factor} * "
    return f"{x} + {factor}({a} {symbol} {b})"


@template("aten.lerp.Scalar", "aten.lerp.Tensor")
def lerp(a: Operand, b: Operand, weight: Any) -> str | None:
    w = in_dtype(weight, a.dtype)
    plain = a.dtype == b.dtype and kind(a) == 2
    return f"{a} + {w} * ({b} - {a})" if plain and w else None


# -- comparisons and logic ----------------------------------------------------------------------


def _operator(symbol: str) -> Any:
    def write(a: Any, b: Any) -> str | None:
        if symbol in ("==", "!=") and kind(a) == 0 and type(b) in (int, bool) and b in (0, 1):
            return str(a) if (symbol == "==") == bool(b) else f"~{a}"
        return combined(f"{{}} {symbol} {{}}", a, b)

    return write


for _names, _symbol in {
    ("eq",): "==",
    ("ne", "not_equal"): "!=",
    ("lt", "less"): "<",
    ("le", "less_equal"): "<=",
    ("gt", "greater"): ">",
    ("ge", "greater_equal"): ">=",
    ("bitwise_and", "__and__"): "&",
    ("bitwise_or", "__or__"): "|",
    ("bitwise_xor", "__xor__"): "^",
}.items():
    template(*(f"aten.{n}.{o}" for n in _names for o in ("Tensor", "Scalar")))(_operator(_symbol))


def truth(x: Operand) -> str:
    """The array as one of bools."""
    return str(x) if x.dtype == "bool" else f"({x} != 0)"


for _name, _symbol in {"and": "&", "or": "|", "xor": "^"}.items():
    template(f"aten.logical_{_name}.default")(
        lambda a, b, symbol=_symbol: f"{truth(a)} {symbol} {truth(b)}"
    )


@template("aten.logical_not.default")
def logical_not(x: Operand) -> str:
    return f"~{x}" if x.dtype == "bool" else f"{x} == 0"


@template("aten.bitwise_not.default")
def bitwise_not(x: Operand) -> str:
    return f"~{x}"


@template("aten.isclose.default")
def isclose(
    a: Operand, b: Operand, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False
) -> str | None:
    if a.dtype != b.dtype or kind(a) != 2:
        return None
    more = (f", rtol={rtol!r}" if rtol != 1e-5 else "") + (
        f", atol={atol!r}" if atol != 1e-8 else ""
    )
    return f"jnp.isclose({a}, {b}{more}{', equal_nan=True' if equal_nan else ''})"


@template("aten.where.self", "aten.where.ScalarSelf", "aten.where.ScalarOther", "aten.where.Scalar")
def where(condition: Operand, a: Any, b: Any) -> str | None:
    dtype = common(a, b)
    if not isinstance(a, Operand) and not isinstance(b, Operand):
        texts = [number(v, dtype) for v in (a, b)]
        if None in texts:
            return None
        made = f"jnp.where({truth(condition)}, {texts[0]}, {texts[1]})"
        return made if dtype == "bool" else f"{made}.astype({dtype_text(dtype)})"
    return combined(f"jnp.where({truth(condition)}, {{}}, {{}})", a, b)


@template("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def masked_fill(x: Operand, mask: Operand, value: Any) -> str | None:
    filled = in_dtype(value, x.dtype)
    return filled and f"jnp.where({truth(mask)}, {filled}, {x})"


# -- functions of floats ------------------------------------------------------------------------

_FUNCTIONS = {
    "sqrt": "jnp.sqrt({x})",
    "exp": "jnp.exp({x})",
    "exp2": "jnp.exp2({x})",
    "expm1": "jnp.expm1({x})",
    "log": "jnp.log({x})",
    "log1p": "jnp.log1p({x})",
    "sin": "jnp.sin({x})",
    "cos": "jnp.cos({x})",
    "tan": "jnp.tan({x})",
    "asin": "jnp.arcsin({x})",
    "acos": "jnp.arccos({x})",
    "atan": "jnp.arctan({x})",
    "sinh": "jnp.sinh({x})",
    "cosh": "jnp.cosh({x})",
    "tanh": "jnp.tanh({x})",
    "asinh": "jnp.arcsinh({x})",
    "acosh": "jnp.arccosh({x})",
    "atanh": "jnp.arctanh({x})",
    "reciprocal": "1 / {x}",
}
_REAL_FUNCTIONS = {
    "rsqrt": "lax.rsqrt({x})",
    "log2": "jnp.log2({x})",
    "log10": "jnp.log10({x})",
    "sigmoid": "jax.nn.sigmoid({x})",
    "special_expit": "jax.nn.sigmoid({x})",
    "erf": "jax.scipy.special.erf({x})",
    "special_erf": "jax.scipy.special.erf({x})",
    "erfc": "jax.scipy.special.erfc({x})",
    "lgamma": "jax.scipy.special.gammaln({x})",
    "sinc": "jnp.sinc({x})",
    "deg2rad": "jnp.deg2rad({x})",
    "rad2deg": "jnp.rad2deg({x})",
}


def _of_float(text: str, real: bool) -> Any:
    def write(x: Operand) -> str | None:
        return None if real and kind(x) == 3 else text.format(x=floats(x))

    return write


for _name, _text_of in _FUNCTIONS.items():
    template(f"aten.{_name}.default")(_of_float(_text_of, False))
for _name, _text_of in _REAL_FUNCTIONS.items():
    template(f"aten.{_name}.default")(_of_float(_text_of, True))


@template("aten.atan2.default", "aten.arctan2.default")
def atan2(a: Operand, b: Operand) -> str | None:
    return combined("jnp.arctan2({}, {})", a, b, floating=True)


@template("aten.logaddexp.default")
def logaddexp(a: Operand, b: Operand) -> str | None:
    if "complex" in a.dtype + b.dtype:  # whose angle JAX brings back to a turn
        return None
    return combined("jnp.logaddexp({}, {})", a, b, floating=True)


@template("aten.hypot.default")
def hypot(a: Operand, b: Operand) -> str | None:
    return combined("jnp.hypot({}, {})", a, b, floating=True)


# -- functions of any number --------------------------------------------------------------------


@template("aten.neg.default", "aten.negative.default")
def neg(x: Operand) -> str:
    return f"-{x}"


@template("aten.abs.default", "aten.absolute.default")
def absolute(x: Operand) -> str:
    return x.text if kind(x) == 0 else f"jnp.abs({x})"


@template("aten.square.default")
def square(x: Operand) -> str | None:
    return f"jnp.square({x})" if kind(x) else None


@template("aten.sign.default", "aten.sgn.default")
def sign(x: Operand) -> str | None:
    """Of floats torch's gives 0 for a NaN."""
    return f"jnp.sign({x})" if kind(x) == 1 else None


def _rounding(function: str) -> Any:
    return lambda x: f"jnp.{function}({x})" if kind(x) == 2 else x.text if kind(x) < 2 else None


for _name in ("ceil", "floor", "round", "trunc"):
    template(f"aten.{_name}.default")(_rounding(_name))
for _name in ("isnan", "isinf", "isfinite"):
    template(f"aten.{_name}.default")(lambda x, name=_name: f"jnp.{name}({x})")


@template("aten.nan_to_num.default")
def nan_to_num(
    x: Operand, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
) -> str | None:
    if kind(x) != 2:
        return x.text if kind(x) < 2 else None
    given = {"nan": nan, "posinf": posinf, "neginf": neginf}
    more = [f"{k}={number(v)}" for k, v in given.items() if v is not None]
    return f"jnp.nan_to_num({', '.join([str(x), *more])})"
