"""Sums, means, extremes, cumulative sums, orders."""

from __future__ import annotations

import math
from typing import Any

from convert.porting.rendering.operands import Operand
from convert.porting.rendering.templates import template
from convert.porting.rendering.templates.pointwise import truth
from convert.porting.rendering.templates.writing import (
    axis_text,
    cast,
    dtype_name,
    floats,
    kind,
    known,
)


def _where(x: Operand, dim: Any, keepdim: bool, *more: str) -> str | None:
    """The arguments that say which axes go; None for an axis of an array that has none."""
    if dim is None or dim == [] or dim == ():
        over = []
    elif not x.shape:
        return None
    else:
        over = [f"axis={axis_text(dim)}"]
    return ", ".join([*over, *more, *(["keepdims=True"] if keepdim else [])])


def _method(x: Operand | str, name: str, where: str | None) -> str | None:
    return None if where is None else f"{x}.{name}({where})"


def _summed(x: Operand, dtype: Any) -> tuple[str, list[str]]:
    """The array to be summed in the dtype, and the argument that says so: torch sums integers as
    int64, JAX as they are."""
    if dtype is None and kind(x) < 2:
        plain = x.dtype in ("bool", "int64")
        return str(x), [] if plain else ["dtype=int"]
    return cast(x, dtype_name(dtype, x.dtype)), []


def _sums(name: str) -> Any:
    def write(x: Operand, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
        text, more = _summed(x, dtype)
        return _method(text, name, _where(x, dim, keepdim, *more))

    return write


template("aten.sum.default", "aten.sum.dim_IntList")(_sums("sum"))
template("aten.prod.dim_int")(_sums("prod"))
template("aten.prod.default")(lambda x, *, dtype=None: _sums("prod")(x, dtype=dtype))


@template("aten.mean.default", "aten.mean.dim")
def mean(x: Operand, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> str | None:
    name = dtype_name(dtype, x.dtype)
    return _method(cast(x, name), "mean", _where(x, dim, keepdim)) if kind(name) >= 2 else None


@template("aten.cumsum.default")
def cumsum(x: Operand, dim: int, *, dtype: Any = None) -> str | None:
    text, more = _summed(x, dtype)
    return _method(text, "cumsum", _where(x, dim, False, *more))


@template("aten.cumprod.default")
def cumprod(x: Operand, dim: int, *, dtype: Any = None) -> str | None:
    text, more = _summed(x, dtype)
    return _method(text, "cumprod", _where(x, dim, False, *more))


def _spread(name: str, root: bool, with_mean: bool) -> None:
    def written(x: Operand, dim: Any, ddof: Any, keepdim: bool) -> str | None:
        where = _where(x, dim, keepdim)
        if where is None or kind(x) != 2 or not isinstance(ddof, int):
            return None
        dims = range(len(x.shape)) if not where.startswith("axis") else _axes(dim)
        sizes = [x.shape[d] for d in dims]
        if math.prod(s for s in sizes if isinstance(s, int)) <= ddof and known(sizes):
            return None
        both = _where(x, dim, keepdim, *([f"ddof={ddof}"] if ddof else []))
        spread = _method(x, "std" if root else "var", both)
        return f"({spread}, {_method(x, 'mean', where)})" if with_mean else spread

    @template(f"aten.{name}.default")
    def default(x: Operand, unbiased: bool = True) -> str | None:
        return written(x, None, int(unbiased), False)

    @template(f"aten.{name}.dim")
    def of_dim(
        x: Operand, dim: Any = None, unbiased: bool = True, keepdim: bool = False
    ) -> str | None:
        return written(x, dim, int(unbiased), keepdim)

    @template(f"aten.{name}.correction")
    def corrected(
        x: Operand, dim: Any = None, *, correction: Any = None, keepdim: bool = False
    ) -> str | None:
        return written(x, dim, 1 if correction is None else correction, keepdim)


def _axes(dim: Any) -> list[int]:
    return list(dim) if isinstance(dim, list | tuple) else [dim]


for _name, _root, _with in (
    ("var", False, False),
    ("std", True, False),
    ("var_mean", False, True),
    ("std_mean", True, True),
):
    _spread(_name, _root, _with)


# -- extremes -----------------------------------------------------------------------------------


def _extreme(name: str) -> Any:
    def write(x: Operand, dim: Any = (), keepdim: bool = False) -> str | None:
        return None if kind(x) == 2 else _method(x, name, _where(x, dim, keepdim))

    return write


def _extreme_at(name: str) -> Any:
    def write(x: Operand, dim: int, keepdim: bool = False) -> str | None:
        where, kept = _where(x, dim, keepdim), _where(x, dim, True)
        if where is None or kept is None or kind(x) != 2:
            return where and f"({x}.{name}({where}), {x}.arg{name}({where}))"
        # Compiled, the gradient of `max` may be wrong: see the rule of amax.
        axis = axis_text(dim)
        values = f"jnp.take_along_axis({x}, {x}.arg{name}({kept}), axis={axis})"
        values += "" if keepdim else f".squeeze({axis})"
        return f"({values}, {x}.arg{name}({where}))"

    return write


for _name in ("max", "min"):
    template(f"aten.a{_name}.default", f"aten.{_name}.default")(_extreme(_name))
    template(f"aten.{_name}.dim")(_extreme_at(_name))
    template(f"aten.arg{_name}.default")(
        lambda x, dim=None, keepdim=False, name=_name: _method(
            x, f"arg{name}", _where(x, dim, keepdim)
        )
    )


def _all_or_any(name: str) -> Any:
    def write(x: Operand, dim: Any = None, keepdim: bool = False) -> str | None:
        if x.dtype == "uint8" or dim == [] or dim == ():
            return None
        return _method(truth(x), name, _where(x, dim, keepdim))

    return write


for _name in ("all", "any"):
    template(*(f"aten.{_name}.{o}" for o in ("default", "dim", "dims")))(_all_or_any(_name))


@template("aten._is_all_true.default")
def is_all_true(x: Operand) -> str:
    return f"{x}.all()"


@template("aten.count_nonzero.default", "aten.count_nonzero.dim_IntList")
def count_nonzero(x: Operand, dim: Any = None) -> str | None:
    where = _where(x, dim, False)
    return (
        None if where is None else f"jnp.count_nonzero({', '.join(filter(None, [str(x), where]))})"
    )


@template("aten.logsumexp.default", "aten.special_logsumexp.default")
def logsumexp(x: Operand, dim: Any, keepdim: bool = False) -> str | None:
    where = _where(x, dim, keepdim)
    if where is None or kind(x) == 3:
        return None
    return f"jax.nn.logsumexp({', '.join(filter(None, [floats(x), where]))})"


@template("aten.linalg_vector_norm.default")
def vector_norm(
    x: Operand, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> str | None:
    where = _where(x, dim, keepdim)
    name = dtype_name(dtype, x.dtype)
    if where is None or kind(x) != 2 or kind(name) != 2:
        return None
    x_text = cast(x, name)
    if ord == 1:
        return f"jnp.abs({x_text}).sum({where})"
    if abs(ord) == math.inf:
        return f"jnp.abs({x_text}).{'max' if ord > 0 else 'min'}({where})"
    if ord != 2:
        return None
    if dim is None or len(_axes(dim)) > 2 or not _axes(dim):
        return f"jnp.sqrt(jnp.square({x_text}).sum({where}))"
    return f"jnp.linalg.norm({x_text}, {where})"


@template("aten.norm.ScalarOpt_dim")
def norm_dim(x: Operand, p: Any, dim: Any, keepdim: bool = False) -> str | None:
    return vector_norm(x, 2 if p is None else p, dim, keepdim)


@template("aten.diff.default")
def diff(
    x: Operand, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None
) -> str | None:
    if not x.shape or any(p is not None and p.dtype != x.dtype for p in (prepend, append)):
        return None
    more = [f"n={n}"] * (n != 1) + [f"axis={dim}"] * (dim != -1)
    more += [f"{k}={v}" for k, v in (("prepend", prepend), ("append", append)) if v is not None]
    return f"jnp.diff({', '.join([str(x), *more])})"


# -- order --------------------------------------------------------------------------------------


def _ordered(x: Operand, dim: int, descending: bool) -> str | None:
    if not x.shape or x.dtype == "bool":
        return None
    return f"axis={dim}" + (", descending=True" if descending else "")


@template("aten.sort.default")
def sort(x: Operand, dim: int = -1, descending: bool = False) -> str | None:
    how = _ordered(x, dim, descending)
    return how and f"(jnp.sort({x}, {how}), jnp.argsort({x}, {how}))"


@template("aten.sort.stable")
def sort_stable(
    x: Operand, *, stable: Any = None, dim: int = -1, descending: bool = False
) -> str | None:
    return sort(x, dim, descending)


@template("aten.argsort.default")
def argsort(x: Operand, dim: int = -1, descending: bool = False) -> str | None:
    how = _ordered(x, dim, descending)
    return how and f"jnp.argsort({x}, {how})"


@template("aten.argsort.stable")
def argsort_stable(
    x: Operand, *, stable: bool, dim: int = -1, descending: bool = False
) -> str | None:
    return argsort(x, dim, descending)


@template("aten.topk.default")
def topk(
    x: Operand, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True
) -> str | None:
    """JAX's indices are of 32 bits, with x64 too: the one dtype here that is not torch's."""
    if not x.shape or not largest or kind(x) not in (1, 2):
        return None
    axis = "" if dim % len(x.shape) == len(x.shape) - 1 else f", axis={dim}"
    return f"lax.top_k({x}, {k}{axis})"
