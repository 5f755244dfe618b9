"""Matrix products, convolutions, pools, attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from convert.porting.rendering.operands import Operand
from convert.porting.rendering.templates import template
from convert.porting.rendering.templates.writing import (
    kind,
    number,
    one_dtype,
    same_shape,
    sizes_text,
)


@template(
    "aten.mm.default",
    "aten.bmm.default",
    "aten.matmul.default",
    "aten.linalg_matmul.default",
    "aten.mv.default",
    "aten.dot.default",
)
def matmul(a: Operand, b: Operand) -> str | None:
    return f"{a} @ {b}" if one_dtype(a, b) else None


@template("aten.linear.default")
def linear(x: Operand, weight: Operand, bias: Operand | None = None) -> str | None:
    if not one_dtype(x, weight, bias) or len(weight.shape) != 2:
        return None
    return f"{x} @ {weight}.T" + (f" + {bias}" if bias is not None else "")


def _added(product: str) -> Any:
    def write(x: Operand, a: Operand, b: Operand, *, beta: Any = 1, alpha: Any = 1) -> str | None:
        if not one_dtype(x, a, b) or kind(x) == 0:
            return None
        factors = [number(v, x.dtype) for v in (beta, alpha)]
        if beta == 0 or None in factors:
            return None
        first = f"{x}" if beta == 1 else f"{factors[0]} * {x}"
        made = product.format(a=a, b=b)
        return f"{first} + {made if alpha == 1 else f'{factors[1]} * ({made})'}"

    return write


for _name in ("addmm", "addmv", "baddbmm"):
    template(f"aten.{_name}.default")(_added("{a} @ {b}"))
template("aten.addr.default")(_added("jnp.outer({a}, {b})"))


def _call(name: str) -> Any:
    return lambda a, b: f"jnp.{name}({a}, {b})" if one_dtype(a, b) else None


for _name, _function in {
    "outer": "outer",
    "ger": "outer",
    "inner": "inner",
}.items():
    template(f"aten.{_name}.default")(_call(_function))


@template("aten.kron.default")
def kron(a: Operand, b: Operand) -> str | None:
    return f"jnp.kron({a}, {b})" if one_dtype(a, b) and a.dtype != "bool" else None


@template("aten.einsum.default")
def einsum(equation: str, tensors: Sequence[Operand], *, path: Any = None) -> str | None:
    equation = equation.replace(" ", "")
    return (
        f'jnp.einsum("{equation}", {", ".join(map(str, tensors))})' if one_dtype(*tensors) else None
    )


@template("aten.tensordot.default")
def tensordot(
    a: Operand, b: Operand, dims_self: Sequence[int], dims_other: Sequence[int]
) -> str | None:
    axes = f"({sizes_text(dims_self)}, {sizes_text(dims_other)})"
    return f"jnp.tensordot({a}, {b}, axes={axes})" if one_dtype(a, b) else None


@template("aten.linalg_inv.default", "aten.inverse.default")
def inverse(x: Operand) -> str:
    return f"jnp.linalg.inv({x})"


@template("aten.linalg_det.default", "aten.det.default")
def determinant(x: Operand) -> str:
    return f"jnp.linalg.det({x})"


# -- complex numbers ----------------------------------------------------------------------------


@template("aten.view_as_complex.default")
def view_as_complex(x: Operand) -> str:
    return f"lax.complex({x}[..., 0], {x}[..., 1])"


@template("aten.view_as_real.default")
def view_as_real(x: Operand) -> str:
    return f"jnp.stack([{x}.real, {x}.imag], axis=-1)"


@template("aten.complex.default")
def complex_(real: Operand, imag: Operand) -> str | None:
    return f"lax.complex({real}, {imag})" if same_shape(real.shape, imag.shape) else None


@template("aten.real.default")
def real(x: Operand) -> str:
    return f"{x}.real" if kind(x) == 3 else x.text


@template("aten.imag.default")
def imag(x: Operand) -> str:
    return f"{x}.imag"


@template("aten._conj.default", "aten.conj.default", "aten.conj_physical.default")
def conj(x: Operand) -> str:
    return f"jnp.conj({x})" if kind(x) == 3 else x.text
