"""Attention, and the norm that needs no layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from convert.porting.plain_masks import ATTENTION, TRI
from convert.porting.rendering.operands import Operand
from convert.porting.rendering.templates import template
from convert.porting.rendering.templates.writing import (
    kind,
    known,
    number,
    one_dtype,
    same_shape,
    sizes_text,
)


@template("aten.rms_norm.default")
def rms_norm(
    x: Operand, normalized_shape: Sequence[Any], weight: Operand | None = None, eps: Any = None
) -> str | None:
    if x.dtype not in ("float32", "float64") or eps is None or not one_dtype(x, weight):
        return None
    axes = tuple(range(-len(normalized_shape), 0))
    axis = axes[0] if len(axes) == 1 else axes
    y = f"{x} * lax.rsqrt(jnp.square({x}).mean(axis={axis}, keepdims=True) + {number(eps)})"
    return y if weight is None else f"{y} * {weight}"


@template(TRI)
def tri(size: Sequence[Any]) -> str:
    text = f"jnp.tri({size[-1]}, dtype=bool)"
    if not all(n == 1 for n in size[:-2]):
        return f"jnp.broadcast_to({text}, {sizes_text(size)})"
    return f"{text}[{', '.join(['None'] * (len(size) - 2))}]" if len(size) > 2 else text


@template(ATTENTION)
def attention(
    q: Operand,
    k: Operand,
    v: Operand,
    attn_mask: Operand | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str | None:
    """JAX's own computes its softmax in float32, and gives the mean where a mask leaves a row
    nothing to see, torch 0: there the steps are written."""
    if dropout_p or not one_dtype(q, k, v) or kind(q) != 2:
        return None
    if attn_mask is not None and attn_mask.dtype not in ("bool", q.dtype):
        return None
    width = q.shape[-1]
    own = scale is None or (isinstance(width, int) and scale == 1 / math.sqrt(width))
    if _fused(q, k, v) and attn_mask is None:
        more = ", is_causal=True" if is_causal else ""
        more += "" if own else f", scale={number(scale)}"
        turned = ", ".join(f"{part}.swapaxes(1, 2)" for part in (q, k, v))
        return f"jax.nn.dot_product_attention({turned}{more}).swapaxes(1, 2)"
    if enable_gqa and not same_shape(q.shape[:-2], k.shape[:-2]):
        return None
    return _steps(q, k, v, attn_mask, is_causal, None if own else scale)


def _fused(q: Operand, k: Operand, v: Operand) -> bool:
    """Whether jax.nn.dot_product_attention does the same."""
    if len(q.shape) != 4 or q.dtype != "float32" or not same_shape(k.shape, v.shape):
        return False
    heads = q.shape[1], k.shape[1]
    grouped = heads[0] == heads[1] or (known(heads) and int(heads[0]) % int(heads[1]) == 0)
    return q.shape[0] == k.shape[0] and q.shape[-1] == k.shape[-1] and grouped


def _steps(
    q: Operand, k: Operand, v: Operand, mask: Operand | None, causal: bool, scale: float | None
) -> str | None:
    width = q.shape[-1]
    if scale is not None:
        factor = f" * {number(scale)}"
    elif not isinstance(width, int):
        factor = f" / math.sqrt({q}.shape[-1])"
    else:
        root = math.sqrt(width)
        factor = f" / {int(root)}" if root.is_integer() else f" / math.sqrt({width})"
    scores = f"{q} @ {k}.swapaxes(-2, -1){factor}"
    where = ""
    if causal:
        if not known((q.shape[-2], k.shape[-2])):
            sizes = f"{q}.shape[-2], {k}.shape[-2]"
        else:
            sizes = f"{q.shape[-2]}, {k.shape[-2]}"
        where = f", where=jnp.tri({sizes}, dtype=bool)"
    if mask is not None and mask.dtype == "bool":
        where = f", where={mask}"
    elif mask is not None:
        scores = f"{scores} + {mask}"
    return f"jax.nn.softmax({scores}, axis=-1{where}) @ {v}"
