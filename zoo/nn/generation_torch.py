"""Decoding token by token: greedy, or sampled by random numbers that the caller gives.

B sequences, V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

State = TypeVar("State")


def choose_token(
    logits: Tensor,
    uniform: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Tensor:
    """logits (B, V) -> tokens (B,): the likeliest, or drawn by `uniform` (B,), each in [0, 1).

    A draw takes the first token at which the cumulative probability exceeds its number, so one
    number gives one token in either framework. `top_k` leaves out all but the likeliest.
    """
    if uniform is None:
        return logits.argmax(-1)
    if top_k is not None:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    cumulative = torch.softmax(logits / temperature, -1).cumsum(-1)
    below = cumulative <= uniform[:, None].to(cumulative.dtype) * cumulative[:, -1:]
    return below.sum(-1).clamp(max=logits.shape[-1] - 1)


def generate_tokens(
    step: Callable[[State, Tensor, int], tuple[Tensor, State]],
    state: State,
    start: Tensor,
    max_new_tokens: int,
    eos_token: int | None = None,
    pad_token: int = 0,
    uniforms: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Tensor:
    """start (B,) -> tokens (B, max_new_tokens), padded after `eos_token`.

    `step(state, tokens, position)` gives the logits (B, V) that follow tokens[:, position], and
    the next state; tokens is (B, max_new_tokens + 1), and beyond `position` it holds padding.
    """
    B = start.shape[0]
    tokens = torch.full((B, max_new_tokens + 1), pad_token, device=start.device)
    tokens[:, 0] = start
    done = torch.zeros(B, dtype=torch.bool, device=start.device)
    for i in range(max_new_tokens):
        logits, state = step(state, tokens, i)
        uniform = None if uniforms is None else uniforms[:, i]
        token = choose_token(logits, uniform, temperature, top_k)
        tokens[:, i + 1] = torch.where(done, pad_token, token)
        if eos_token is not None:
            done |= token == eos_token
            if done.all():
                break
    return tokens[:, 1:]
