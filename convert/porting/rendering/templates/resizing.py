"""Images and signals of another size, channels first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from convert.porting.rendering.operands import Operand
from convert.porting.rendering.templates import template
from convert.porting.rendering.templates.writing import kind, value_of


def _factors(x: Operand, size: Any, scales: Sequence[Any]) -> list[int] | None:
    """By which whole numbers the axes grow; None where they do otherwise."""
    given = [s for s in scales if s is not None]
    if given:
        whole = len(given) == len(x.shape) - 2 and all(s >= 1 and s == int(s) for s in given)
        return [int(s) for s in given] if whole else None
    pairs = [(n, value_of(m)) for n, m in zip(x.shape[2:], size, strict=True)]
    if not all(isinstance(n, int) and isinstance(m, int) and m % n == 0 for n, m in pairs):
        return None
    return [int(m) // int(n) for n, m in pairs]


def _nearest(x: Operand, size: Any, scales: Sequence[Any]) -> str | None:
    factors = _factors(x, size, scales)
    if factors is None:
        return None
    text = str(x)
    for axis, factor in enumerate(factors, start=2):
        text += "" if factor == 1 else f".repeat({factor}, axis={axis})"
    return text


def _weighted(
    x: Operand, size: Any, scales: Sequence[Any], corners: bool, method: str, antialias: bool
) -> str | None:
    """JAX's weights are torch's, but for those of its cubic kernel without antialias, and where
    the corners are aligned. A scale that is no whole number is another step than the sizes say."""
    if corners or kind(x) != 2:
        return None
    factors = _factors(x, size, scales) if any(s is not None for s in scales) else []
    if factors is None:
        return None
    if size is None:
        scaled = enumerate(factors, start=2)
        sizes = [f"{x}.shape[{i}]" + ("" if f == 1 else f" * {f}") for i, f in scaled]
    else:
        sizes = [str(s) for s in size]
    more = "" if antialias else ", antialias=False"
    return f'jax.image.resize({x}, (*{x}.shape[:2], {", ".join(sizes)}), "{method}"{more})'


def _enter(n: int) -> None:
    @template(f"aten.upsample_nearest{n}d.vec")
    def nearest_vec(x: Operand, output_size: Any, scale_factors: Any) -> str | None:
        return _nearest(x, output_size, scale_factors or [])

    @template(f"aten.upsample_nearest{n}d.default")
    def nearest(x: Operand, size: Any, *scales: Any, **named: Any) -> str | None:
        return _nearest(x, size, [*scales, *named.values()])


def _enter_weighted(name: str, method: str, antialias: bool) -> None:
    @template(f"aten.{name}.vec")
    def weighted_vec(
        x: Operand, output_size: Any, align_corners: bool, scale_factors: Any
    ) -> str | None:
        return _weighted(x, output_size, scale_factors or [], align_corners, method, antialias)

    @template(f"aten.{name}.default")
    def weighted(
        x: Operand, size: Any, align_corners: bool, *scales: Any, **named: Any
    ) -> str | None:
        given = [*scales, *named.values()]
        return _weighted(x, size, given, align_corners, method, antialias)


for _n in (1, 2, 3):
    _enter(_n)
for _name, _method, _antialias in (
    ("upsample_linear1d", "linear", False),
    ("upsample_bilinear2d", "bilinear", False),
    ("upsample_trilinear3d", "trilinear", False),
    ("_upsample_bilinear2d_aa", "bilinear", True),
    ("_upsample_bicubic2d_aa", "bicubic", True),
):
    _enter_weighted(_name, _method, _antialias)
