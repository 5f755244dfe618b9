"""Operations on images with channels last (see image_axes/image_operations)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from convert.porting.rendering.operands import Operand
from convert.porting.rendering.templates import template
from convert.porting.rendering.templates.windows import convolved, tupled
from convert.porting.rendering.templates.writing import (
    kind,
    known,
    number,
    one_dtype,
    pairs,
    sizes_text,
    value_of,
)

_AXES = {1: ("NWC", "OIW"), 2: ("NHWC", "OIHW"), 3: ("NDHWC", "OIDHW")}


@template(*(f"last.conv{n}d.{o}" for n in (1, 2, 3) for o in ("default", "padding")))
def conv(
    x: Operand,
    weight: Operand,
    bias: Operand | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> str | None:
    """The kernel keeps torch's axes."""
    data, kernel = _AXES.get(len(weight.shape) - 2, ("", ""))
    axes = f', dimension_numbers=("{data}", "{kernel}", "{data}")'
    y = convolved(x, weight, bias, stride, padding, dilation, groups, axes)
    return y if bias is None or y is None else f"{y} + {bias}"


def _window(x: Operand, n: int, kernel: Any, stride: Any, padding: Any) -> str:
    kernel = tupled(kernel, n)
    stride = tupled(stride, n) if stride not in (None, [], ()) else kernel
    padding = tupled(padding, n)
    shown = [str(x), repr(kernel)]
    shown += [f"strides={stride}"] if any(s != 1 for s in stride) else []
    shown += [f"padding={pairs([(p, p) for p in padding])}"] if any(padding) else []
    return ", ".join(shown)


def _enter_pools(n: int) -> None:
    @template(f"last.max_pool{n}d.default")
    def max_pool(
        x: Operand, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
        ceil: bool = False,
    ) -> str | None:  # fmt: skip
        if len(x.shape) != n + 2 or kind(x) != 2 or tupled(dilation, n) != (1,) * n:
            return None
        if ceil:
            return _ours("max_pool", x, kernel, stride, padding, "ceil_mode=True")
        return f"nnx.max_pool({_window(x, n, kernel, stride, padding)})"

    @template(f"last.avg_pool{n}d.default")
    def avg_pool(
        x: Operand, kernel: Any, stride: Any = (), padding: Any = 0, ceil_mode: bool = False,
        count_include_pad: bool = True, divisor_override: int | None = None,
    ) -> str | None:  # fmt: skip
        plain = len(x.shape) == n + 2 and x.dtype in ("float32", "float64")
        if not plain or divisor_override:
            return None
        if ceil_mode or (any(tupled(padding, n)) and not count_include_pad):
            more = ["ceil_mode=True"] * ceil_mode
            more += [] if count_include_pad else ["count_include_pad=False"]
            return _ours("avg_pool", x, kernel, stride, padding, *more)
        return f"nnx.avg_pool({_window(x, n, kernel, stride, padding)})"

    names = (f"adaptive_avg_pool{n}d", *([f"_adaptive_avg_pool{n}d"] if n > 1 else []))

    @template(*(f"last.{name}.default" for name in names))
    def adaptive(x: Operand, output_size: Any) -> str | None:
        sizes = tupled(output_size, n)
        if kind(x) != 2 or len(x.shape) != n + 2:
            return None
        if all(value_of(s) == 1 for s in sizes):
            axes = tuple(range(1, n + 1))
            return f"{x}.mean(axis={axes if n > 1 else 1}, keepdims=True)"
        return f"adaptive_avg_pool({x}, {_one_or_each(sizes)})" if known(sizes) else None


def _ours(name: str, x: Operand, kernel: Any, stride: Any, padding: Any, *more: str) -> str:
    """zoo.nn's pool."""
    shown = [_one_or_each(kernel)]
    shown += [f"stride={_one_or_each(stride)}"] if stride not in (None, [], (), kernel) else []
    pads = padding if isinstance(padding, list | tuple) else [padding]
    shown += [f"padding={_one_or_each(padding)}"] if any(pads) else []
    return f"{name}({', '.join([str(x), *shown, *more])})"


def _one_or_each(values: Any) -> str:
    if not isinstance(values, list | tuple):
        return str(values)
    texts = list(map(str, values))
    return texts[0] if len(set(texts)) == 1 else f"({', '.join(texts)})"


for _n in (1, 2, 3):
    _enter_pools(_n)


# -- resizing -----------------------------------------------------------------------------------


def _interpolated(
    x: Operand, size: Any, scales: Sequence[Any], mode: str, corners: bool = False
) -> str | None:
    """zoo.nn's interpolate, of whole factors or of sizes."""
    given = [s for s in scales if s is not None]
    if kind(x) != 2 or (given and not all(s == int(s) for s in given)):
        return None
    if given:
        sizes = f"scale_factor={_one_or_each([int(s) for s in given])}"
    elif size is not None:
        sizes = f"size={sizes_text(size)}" if not known(size) else f"size={_one_or_each(size)}"
    else:
        return None
    more = "" if mode == "nearest" else f', mode="{mode}"'
    more += ", align_corners=True" if corners else ""
    return f"interpolate({x}, {sizes}{more})"


def _enter_nearest(name: str, mode: str) -> None:
    @template(f"last.{name}.vec")
    def vec(x: Operand, output_size: Any, scale_factors: Any) -> str | None:
        return _interpolated(x, output_size, scale_factors or [], mode)

    @template(f"last.{name}.default")
    def default(x: Operand, size: Any, *scales: Any, **named: Any) -> str | None:
        return _interpolated(x, size, [*scales, *named.values()], mode)


def _enter_linear(name: str) -> None:
    @template(f"last.{name}.vec")
    def vec(x: Operand, output_size: Any, align_corners: bool, scale_factors: Any) -> str | None:
        return _interpolated(x, output_size, scale_factors or [], "linear", align_corners)

    @template(f"last.{name}.default")
    def default(
        x: Operand, size: Any, align_corners: bool, *scales: Any, **named: Any
    ) -> str | None:
        return _interpolated(x, size, [*scales, *named.values()], "linear", align_corners)


for _n in (1, 2, 3):
    _enter_nearest(f"upsample_nearest{_n}d", "nearest")
    _enter_nearest(f"_upsample_nearest_exact{_n}d", "nearest-exact")
for _name in ("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"):
    _enter_linear(_name)


@template("last.pixel_shuffle.default")
def pixel_shuffle(x: Operand, upscale_factor: int) -> str | None:
    return f"pixel_shuffle({x}, {upscale_factor})" if len(x.shape) == 4 else None


# -- norms --------------------------------------------------------------------------------------


def _affine(y: str, weight: Operand | None, bias: Operand | None) -> str:
    y = y if weight is None else f"{y} * {weight}"
    return y if bias is None else f"{y} + {bias}"


@template("last.batch_norm.default")
def batch_norm(
    x: Operand, weight: Operand | None, bias: Operand | None, mean: Operand | None,
    var: Operand | None, training: bool, momentum: float, eps: float, cudnn: bool = True,
) -> str | None:  # fmt: skip
    if training or mean is None or var is None or not one_dtype(x, weight, bias, mean, var):
        return None
    if x.dtype not in ("float32", "float64"):
        return None
    return _affine(f"({x} - {mean}) * lax.rsqrt({var} + {number(eps)})", weight, bias)


@template("last.prelu.default")
def prelu(x: Operand, weight: Operand) -> str | None:
    if x.dtype != weight.dtype or kind(x) != 2:
        return None
    return f"jnp.where({x} > 0, {x}, {weight} * {x})"
