"""What torch computes in one fused call, written out: each is recorded as its steps.

Each takes what the fused function takes, and gives what it gives up to rounding.
NotImplementedError where an argument asks for what is not written out here; the call then stays
one operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def scaled_dot_product_attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """torch.nn.functional.scaled_dot_product_attention; (..., T, D) each."""
    import torch

    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key = key.repeat_interleave(groups, -3)
        value = value.repeat_interleave(groups, -3)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = torch.matmul(query, key.transpose(-2, -1)) * factor
    if is_causal:
        T, S = query.shape[-2], key.shape[-2]
        seen = torch.ones(T, S, dtype=torch.bool).tril(0)
        logits = logits.masked_fill(torch.logical_not(seen), -math.inf)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(torch.logical_not(attn_mask), -math.inf)
        else:
            logits = logits + attn_mask
    return torch.matmul(torch.softmax(logits, -1), value)


def layer_norm(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    """torch.nn.functional.layer_norm."""
    dims = tuple(range(-len(normalized_shape), 0))
    return _affine(_normalised(input, dims, eps), weight, bias)


def rms_norm(
    input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Any:
    """torch.nn.functional.rms_norm."""
    import torch

    if eps is None:
        eps = torch.finfo(input.dtype).eps
    dims = tuple(range(-len(normalized_shape), 0))
    square = (input * input).mean(dims, keepdim=True)
    return _affine(input * torch.rsqrt(square + eps), weight, None)


def group_norm(
    input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    """torch.nn.functional.group_norm; (B, C, ...)."""
    grouped = input.reshape(input.shape[0], num_groups, -1)
    made = _normalised(grouped, (-1,), eps).reshape(input.shape)
    return _affine(made, _channels(weight, input), _channels(bias, input))


def batch_norm(
    input: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    """torch.nn.functional.batch_norm in eval mode; (B, C, ...)."""
    import torch

    if training or running_mean is None:
        raise NotImplementedError
    mean, variance = _channels(running_mean, input), _channels(running_var, input)
    made = (input - mean) * torch.rsqrt(variance + eps)
    return _affine(made, _channels(weight, input), _channels(bias, input))


def normalize(input: Any, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None) -> Any:
    """torch.nn.functional.normalize."""
    import torch

    if out is not None or p != 2.0:
        raise NotImplementedError
    length = torch.sqrt((input * input).sum(dim, keepdim=True))
    return input / length.clamp(min=eps)


def _normalised(x: Any, dims: tuple[int, ...], eps: float) -> Any:
    import torch

    mean = x.mean(dims, keepdim=True)
    variance = x.var(dims, unbiased=False, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + eps)


def _affine(x: Any, weight: Any, bias: Any) -> Any:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _channels(t: Any, x: Any) -> Any:
    return None if t is None else t.reshape((1, -1) + (1,) * (x.ndim - 2))


def multi_head_attention_forward(
    query: Any, key: Any, value: Any, embed_dim_to_check: int, num_heads: int,
    in_proj_weight: Any, in_proj_bias: Any, bias_k: Any, bias_v: Any, add_zero_attn: bool,
    dropout_p: float, out_proj_weight: Any, out_proj_bias: Any, training: bool = True,
    key_padding_mask: Any = None, need_weights: bool = True, attn_mask: Any = None,
    use_separate_proj_weight: bool = False, q_proj_weight: Any = None, k_proj_weight: Any = None,
    v_proj_weight: Any = None, static_k: Any = None, static_v: Any = None,
    average_attn_weights: bool = True, is_causal: bool = False,
) -> Any:  # fmt: skip
    """torch.nn.functional.multi_head_attention_forward in eval mode; (T, B, E)."""
    import torch

    odd = (bias_k, bias_v, static_k, static_v)
    if add_zero_attn or any(x is not None for x in odd) or query.ndim != 3:
        raise NotImplementedError
    T, B, E = query.shape
    weights = (q_proj_weight, k_proj_weight, v_proj_weight)
    if not use_separate_proj_weight:
        weights = tuple(in_proj_weight.chunk(3))
    biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    linear = torch.nn.functional.linear

    def heads(x: Any, weight: Any, bias: Any) -> Any:
        made = linear(x, weight, bias)
        return made.reshape(made.shape[0], B, num_heads, E // num_heads).permute(1, 2, 0, 3)

    q, k, v = (heads(*a) for a in zip((query, key, value), weights, biases, strict=True))
    logits = torch.matmul(q * (1 / math.sqrt(E // num_heads)), k.transpose(-2, -1))
    if attn_mask is not None:
        if attn_mask.ndim == 3:
            attn_mask = attn_mask.reshape(B, num_heads, T, -1)
        logits = _masked(logits, attn_mask)
    if key_padding_mask is not None:
        logits = _masked(logits, key_padding_mask.reshape(B, 1, 1, -1))
    shares = torch.softmax(logits, -1)
    mixed = torch.matmul(shares, v).permute(2, 0, 1, 3).reshape(T, B, E)
    made = linear(mixed, out_proj_weight, out_proj_bias)
    if not need_weights:
        return made, None
    return made, shares.mean(1) if average_attn_weights else shares


def _masked(logits: Any, mask: Any) -> Any:
    import torch

    return logits.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else logits + mask


OPENED: dict[str, Callable[..., Any]] = {
    "torch.nn.functional.scaled_dot_product_attention": scaled_dot_product_attention,
    "torch.nn.functional.layer_norm": layer_norm,
    "torch.nn.functional.rms_norm": rms_norm,
    "torch.rms_norm": rms_norm,
    "torch.nn.functional.group_norm": group_norm,
    "torch.nn.functional.batch_norm": batch_norm,
    "torch.nn.functional.normalize": normalize,
    "torch.nn.functional.multi_head_attention_forward": multi_head_attention_forward,
}
