"""Convolutions and pools, channels first."""

from __future__ import annotations

import math
from typing import Any

from convert.porting.rendering.operands import Operand
from convert.porting.rendering.templates import template
from convert.porting.rendering.templates.writing import (
    kind,
    known,
    one_dtype,
    pairs,
    same_shape,
    sizes_text,
    value_of,
)


def tupled(value: Any, n: int) -> tuple[Any, ...]:
    """One number for each axis."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * n if len(values) == 1 else values


@template(
    *(f"aten.conv{n}d.{o}" for n in (1, 2, 3) for o in ("default", "padding")),
)
def conv(
    x: Operand,
    weight: Operand,
    bias: Operand | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> str | None:
    """lax's own order of axes is torch's."""
    y = convolved(x, weight, bias, stride, padding, dilation, groups)
    return y if bias is None or y is None else f"{y} + {bias}[:{', None' * (len(x.shape) - 2)}]"


def convolved(
    x: Operand,
    weight: Operand,
    bias: Operand | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    axes: str = "",
) -> str | None:
    """The convolution without its bias; `axes` is what lax is told of them."""
    n = len(weight.shape) - 2
    if not one_dtype(x, weight, bias) or len(x.shape) != n + 2 or n > 3 or kind(x) != 2:
        return None
    stride, dilation = tupled(stride, n), tupled(dilation, n)
    if isinstance(padding, str):
        pads = f'"{padding.upper()}"'
        if padding == "same" and stride != (1,) * n:
            return None
    else:
        sides = tupled(padding, n)
        pads = pairs([(p, p) for p in sides]) if any(sides) else '"VALID"'
    more = "" if dilation == (1,) * n else f", rhs_dilation={sizes_text(dilation)}"
    more += axes + ("" if groups == 1 else f", feature_group_count={groups}")
    return f"lax.conv_general_dilated({x}, {weight}, {sizes_text(stride)}, {pads}{more})"


def _outputs(size: int, k: int, s: int, p: int, ceil: bool) -> int:
    """The padding that the last window of an axis needs behind (torch's: it begins inside)."""
    over = size + 2 * p - k
    count = (-(-over // s) if ceil else over // s) + 1
    if ceil and (count - 1) * s >= size + p:
        count -= 1
    return max((count - 1) * s + k - size - p, 0)


def _windows(x: Operand, n: int, kernel: Any, stride: Any, padding: Any, ceil: bool) -> Any:
    """What lax.reduce_window is told: windows, strides, and pads, "VALID" where there are none."""
    kernel = tupled(kernel, n)
    stride = tupled(stride, n) if stride not in (None, [], ()) else kernel
    padding = tupled(padding, n)
    lead = (1,) * (len(x.shape) - n)
    space = x.shape[-n:]
    behind = list(padding)
    if ceil:
        if not known(space):
            return None
        every = zip(space, kernel, stride, padding, strict=True)
        behind = [_outputs(int(a), b, c, d, True) for a, b, c, d in every]
    sides = [(0, 0)] * len(lead) + list(zip(padding, behind, strict=True))
    pads = pairs(sides) if any(map(any, sides)) else '"VALID"'
    return kernel, padding, f"{lead + kernel}, {lead + stride}, {pads}", behind


def _enter_pools(n: int) -> None:
    @template(f"aten.max_pool{n}d.default")
    def max_pool(
        x: Operand,
        kernel: Any,
        stride: Any = (),
        padding: Any = 0,
        dilation: Any = 1,
        ceil: bool = False,
    ) -> str | None:
        made = _windows(x, n, kernel, stride, padding, ceil)
        if made is None or kind(x) != 2 or tupled(dilation, n) != (1,) * n:
            return None
        return f"lax.reduce_window({x}, -jnp.inf, lax.max, {made[2]})"

    @template(f"aten.avg_pool{n}d.default")
    def avg_pool(
        x: Operand,
        kernel: Any,
        stride: Any = (),
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> str | None:
        made = _windows(x, n, kernel, stride, padding, ceil_mode)
        if made is None or x.dtype not in ("float32", "float64"):
            return None
        kernel, padding, windows, behind = made
        whole = count_include_pad or not any(padding)
        partly = any(b > p for b, p in zip(behind, padding, strict=True))
        if not divisor_override and (not whole or partly):
            return None
        divisor = divisor_override or math.prod(kernel)
        return f"lax.reduce_window({x}, 0.0, lax.add, {windows}) / {divisor}"

    names = (f"adaptive_avg_pool{n}d", *([f"_adaptive_avg_pool{n}d"] if n > 1 else []))

    @template(*(f"aten.{name}.default" for name in names))
    def adaptive(x: Operand, output_size: Any) -> str | None:
        sizes = tupled(output_size, n)
        lead, space = x.shape[:-n], x.shape[-n:]
        if kind(x) != 2:
            return None
        if all(value_of(s) == 1 for s in sizes):
            axes = tuple(range(len(lead), len(x.shape)))
            return f"{x}.mean(axis={axes if n > 1 else axes[0]}, keepdims=True)"
        if same_shape(sizes, space):
            return x.text
        if (
            not known(sizes)
            or not known(space)
            or any(int(a) % int(b) for a, b in zip(space, sizes, strict=True))
        ):
            return None
        shape = [f"*{x}.shape[:{len(lead)}]"]
        for size, count in zip(space, sizes, strict=True):
            shape += [str(count), str(int(size) // count)]
        axes = tuple(len(lead) + 1 + 2 * i for i in range(n))
        return f"{x}.reshape({', '.join(shape)}).mean(axis={axes if n > 1 else axes[0]})"


for _n in (1, 2, 3):
    _enter_pools(_n)
