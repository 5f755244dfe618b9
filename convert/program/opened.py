"""What torch computes in one fused call, written out: each is recorded as its steps.

Each takes what the fused function takes, and gives what it gives up to rounding. NotImplementedError
where an argument asks for what is not written out here; the call then stays one operation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


def recurrent(
    cell: str, x: Any, states: Sequence[Any], weights: Sequence[Any], *, has_biases: bool,
    num_layers: int, bidirectional: bool, batch_first: bool, order: str = "", reset: str = "after",
    update: str = "keep", forget: float = 0.0, ways: str = "fb", joined: str = "fb",
    biases: str = "ih", stack: str = "01", activations: str = "", left: str = "",
) -> Any:  # fmt: skip
    """nn.LSTM, nn.GRU and nn.RNN as a loop over layers, directions and steps.

    `weights` are torch's flat weights. What differs between implementations is an argument; the
    defaults are torch's: `order` of the gates, where a GRU's `reset` acts, whether its `update`
    gate keeps the old state, what is added to the `forget` gate, in which direction the first and
    the second of two `ways` go, how both are `joined`, which `biases` are added, in which order
    the layers `stack`, `activations` (gate, candidate, output), which states are `left` out ("h"
    or "c": they start at zero).
    """
    import torch

    x = x.transpose(0, 1) if batch_first else x
    step = 4 if has_biases else 2
    ends: list[list[Any]] = [[], []]
    many = 2 if bidirectional else 1
    for layer in range(num_layers):
        at = int(stack[layer]) if layer < len(stack) else layer
        at = at if at < num_layers else layer
        outs = []
        for way in range(many):
            i = at * many + way
            first = [s[i] for s in states]
            first = [f * 0 if n in left else f for f, n in zip(first, "hc", strict=False)]
            parts = list(weights[i * step : (i + 1) * step])
            steps = x.unbind(0)
            backwards = ways[way] == "b"
            made, last = _steps(cell, steps[::-1] if backwards else steps, first, parts,
                                order, reset, update, forget, biases, activations)  # fmt: skip
            outs.append(torch.stack(made[::-1] if backwards and way == 1 else made))
            for end, state in zip(ends, last, strict=False):
                end.append(state)
        if many == 2:
            a, b = outs
            x = {"fb": lambda: torch.cat((a, b), -1), "bf": lambda: torch.cat((b, a), -1),
                 "sum": lambda: a + b, "mean": lambda: (a + b) / 2,
                 "unflipped": lambda: torch.cat((a, b.flip(0)), -1)}[joined]()  # fmt: skip
        else:
            x = outs[0]
    x = x.transpose(0, 1) if batch_first else x
    hidden = tuple(torch.stack(e) for e in ends if e)
    return (x, *hidden)


def _steps(
    cell: str, steps: Sequence[Any], first: list[Any], parts: list[Any], order: str, reset: str,
    update: str, forget: float, biases: str, activations: str,
) -> tuple[list[Any], list[Any]]:  # fmt: skip
    import torch

    gate, candidate, output = activations.split(",") if activations else ("", "", "")
    squash = getattr(torch, gate or "sigmoid")
    inner = getattr(torch, candidate or ("relu" if cell == "rnn_relu" else "tanh"))
    outer = getattr(torch, output or "tanh")
    w_i, w_h, *b = parts
    b_i = b[0] if b and "i" in biases else 0.0
    b_h = b[1] if b and "h" in biases else 0.0
    state, made = list(first), []
    for x in steps:
        h = state[0]
        ours, its = x @ w_i.T + b_i, h @ w_h.T
        if cell == "lstm":
            chunks = dict(zip(order or "ifgo", (ours + its + b_h).chunk(4, -1), strict=True))
            c = squash(chunks["f"] + forget) * state[1] + squash(chunks["i"]) * inner(chunks["g"])
            state = [squash(chunks["o"]) * outer(c), c]
        elif cell == "gru":
            a = dict(zip(order or "rzn", ours.chunk(3, -1), strict=True))
            r, z = _gru_gates(a, dict(zip(order or "rzn", (its + b_h).chunk(3, -1), strict=True)),
                              squash)  # fmt: skip
            place = (order or "rzn").index("n")
            w_n = w_h.chunk(3, 0)[place].T
            b_n = b_h.chunk(3, -1)[place] if torch.is_tensor(b_h) else 0.0
            held = {"after": lambda: r * (h @ w_n + b_n), "before": lambda: (r * h) @ w_n + b_n,
                    "bias outside": lambda: r * (h @ w_n) + b_n}[reset]()  # fmt: skip
            n = inner(a["n"] + held)
            state = [(1 - z) * n + z * h if update == "keep" else z * n + (1 - z) * h]
        else:
            state = [inner(ours + its + b_h)]
        made.append(state[0])
    return made, state


def _gru_gates(a: dict[str, Any], b: dict[str, Any], squash: Any) -> tuple[Any, Any]:
    return squash(a["r"] + b["r"]), squash(a["z"] + b["z"])


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
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def as_recurrent(cell: str, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `recurrent` for those of torch.lstm and its like. NotImplementedError for
    packed sequences."""
    import torch

    x, states, weights = args[:3]
    if len(args) != 9 or torch.is_tensor(weights):
        raise NotImplementedError
    biases, layers, _, _, both, batch_first = args[3:]
    states = tuple(states) if cell == "lstm" else (states,)
    if len(weights) != layers * (2 if both else 1) * (4 if biases else 2) or x.ndim != 3:
        raise NotImplementedError  # a projection, or a sequence without a batch
    return (cell, x, states, tuple(weights)), {
        "has_biases": biases, "num_layers": layers, "bidirectional": both,
        "batch_first": batch_first,
    }  # fmt: skip
