"""Decoding token by token: greedy, or sampled by random numbers that the caller gives.

B sequences, V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

State = TypeVar("State")


def choose_token(
    logits: Array,
    uniform: Array | None = None,
    temperature: float | Array = 1.0,
    top_k: int | None = None,
) -> Array:
    """logits (B, V) -> tokens (B,): the likeliest, or drawn by `uniform` (B,), each in [0, 1).

    A draw takes the first token at which the cumulative probability exceeds its number, so one
    number gives one token in either framework. `top_k` leaves out all but the likeliest.
    """
    if uniform is None:
        return logits.argmax(-1)
    if top_k is not None:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    cumulative = jax.nn.softmax(logits / temperature, -1).cumsum(-1)
    below = cumulative <= uniform[:, None].astype(cumulative.dtype) * cumulative[:, -1:]
    return below.sum(-1).clip(max=logits.shape[-1] - 1)


def generate_tokens(
    step: Callable[[State, Array, Array], tuple[Array, State]],
    state: State,
    start: Array,
    max_new_tokens: int,
    eos_token: int | None = None,
    pad_token: int = 0,
    uniforms: Array | None = None,
    temperature: float | Array = 1.0,
    top_k: int | None = None,
) -> Array:
    """start (B,) -> tokens (B, max_new_tokens), padded after `eos_token`.

    `step(state, tokens, position)` gives the logits (B, V) that follow tokens[:, position], and
    the next state; tokens is (B, max_new_tokens + 1), and beyond `position` it holds padding.
    Shapes do not change from step to step: under jit, `step` is compiled once.
    """
    tokens = jnp.full((len(start), max_new_tokens + 1), pad_token, start.dtype)
    first = (0, tokens.at[:, 0].set(start), jnp.zeros(len(start), bool), state)

    def unfinished(carry: Any) -> Array:
        i, _, done, _ = carry
        return (i < max_new_tokens) & ~done.all()

    def advance(carry: Any) -> Any:
        i, tokens, done, state = carry
        logits, state = step(state, tokens, i)
        uniform = None if uniforms is None else uniforms[:, i]
        token = choose_token(logits, uniform, temperature, top_k).astype(tokens.dtype)
        tokens = tokens.at[:, i + 1].set(jnp.where(done, pad_token, token))
        if eos_token is not None:
            done = done | (token == eos_token)
        return i + 1, tokens, done, state

    return jax.lax.while_loop(unfinished, advance, first)[1][:, 1:]
