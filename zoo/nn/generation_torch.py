"""Decoding token by token: greedy, or sampled by random numbers that the caller gives.

B sequences, V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from zoo.nn.attention_torch import KeyValue, empty_cache

State = TypeVar("State")


class EncoderDecoder(Protocol):
    """The methods of a model that `generate` calls."""

    def remember(self, source: Tensor, mask: Tensor | None) -> list[KeyValue]:
        """source (B, S) ids -> its keys and values for each layer of the decoder."""

    def decode(
        self,
        tokens: Tensor,
        memory: list[KeyValue],
        mask: Tensor | None,
        memory_mask: Tensor | None,
        past: list[KeyValue] | None = None,
        position: int = 0,
        /,
    ) -> tuple[Tensor, list[KeyValue], *tuple[Any, ...]]:
        """tokens (B, T), the first at `position` -> logits (B, T, V), caches, and anything else."""


def check_request(
    batch: int, max_new_tokens: int, uniforms: Tensor | None, temperature: float
) -> None:
    """Raises ValueError unless both numbers are positive and `uniforms` has the right shape."""
    if max_new_tokens < 1 or not temperature > 0:
        raise ValueError(
            f"max_new_tokens {max_new_tokens} and temperature {temperature} must be above 0"
        )
    if uniforms is not None and tuple(uniforms.shape) != (batch, max_new_tokens):
        raise ValueError(
            f"uniforms are {tuple(uniforms.shape)}, not (batch, max_new_tokens) = "
            f"{(batch, max_new_tokens)}"
        )


def choose_token(
    logits: Tensor,
    uniform: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Tensor:
    """logits (B, V) -> tokens (B,): the likeliest, or drawn by `uniform` (B,), each in [0, 1).

    A draw is the first token at which the cumulative probability exceeds the number, so that the
    same number draws the same token in both frameworks. `top_k` draws from the k likeliest only.
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
    the next state; tokens is (B, max_new_tokens + 1), with padding after `position`.
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


@torch.no_grad()
def generate(
    model: EncoderDecoder,
    source: Tensor,
    mask: Tensor | None,
    max_new_tokens: int,
    special: tuple[int, int | None, int],
    uniforms: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    use_cache: bool = True,
) -> Tensor:
    """source (B, S) ids -> tokens (B, max_new_tokens); `special` is (start, end, padding).

    Raises ValueError as `check_request` does.
    """
    check_request(len(source), max_new_tokens, uniforms, temperature)
    memory = model.remember(source, mask)

    def cached(past: Any, tokens: Tensor, i: int) -> tuple[Tensor, Any]:
        logits, past, *_ = model.decode(tokens[:, i : i + 1], memory, None, mask, past, i)
        return logits[:, 0], past

    def uncached(past: Any, tokens: Tensor, i: int) -> tuple[Tensor, Any]:
        return model.decode(tokens, memory, None, mask)[0][:, i], None

    past = [empty_cache(kv, max_new_tokens) for kv in memory] if use_cache else None
    step: Any = cached if use_cache else uncached
    start_token, eos_token, pad_token = special
    start = torch.full((len(source),), start_token, device=source.device)
    return generate_tokens(
        step, past, start, max_new_tokens, eos_token, pad_token, uniforms, temperature, top_k
    )
