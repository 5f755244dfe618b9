"""Decoding token by token: greedy, or sampled by random numbers that the caller gives.

B sequences, V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from zoo.nn.attention_flax import KeyValue, empty_cache

State = TypeVar("State")


class EncoderDecoder(Protocol):
    """The methods of a model that `generate` calls."""

    def remember(self, source: Array, mask: Array | None) -> list[KeyValue]:
        """source (B, S) ids -> its keys and values for each layer of the decoder."""

    def decode(
        self,
        tokens: Array,
        memory: list[KeyValue],
        mask: Array | None,
        memory_mask: Array | None,
        past: list[KeyValue] | None = None,
        position: ArrayLike = 0,
        /,
    ) -> tuple[Array, list[KeyValue], *tuple[Any, ...]]:
        """tokens (B, T), the first at `position` -> logits (B, T, V), caches, and anything else."""


def check_request(
    batch: int, max_new_tokens: int, uniforms: Array | None, temperature: float
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
    logits: Array,
    uniform: Array | None = None,
    temperature: float | Array = 1.0,
    top_k: int | None = None,
) -> Array:
    """logits (B, V) -> tokens (B,): the likeliest, or drawn by `uniform` (B,), each in [0, 1).

    A draw is the first token at which the cumulative probability exceeds the number, so that the
    same number draws the same token in both frameworks. `top_k` draws from the k likeliest only.
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
    the next state; tokens is (B, max_new_tokens + 1), with padding after `position`. Shapes do not
    change from step to step, so that under jit `step` is compiled once.
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


def generate(
    model: EncoderDecoder,
    source: Array,
    mask: Array | None,
    max_new_tokens: int,
    special: tuple[int, int | None, int],
    uniforms: Array | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    use_cache: bool = True,
) -> Array:
    """source (B, S) ids -> tokens (B, max_new_tokens); `special` is (start, end, padding).

    Compiled once, and again if the model's structure, a shape or another argument changes;
    `uniforms` and `temperature` may change. Raises ValueError as `check_request` does.
    """
    check_request(len(source), max_new_tokens, uniforms, temperature)
    graph, state = nnx.split(model)
    source = jnp.asarray(source)
    tokens: Array = _generate(
        graph,
        state,
        source,
        mask,
        max_new_tokens,
        special,
        uniforms,
        temperature,
        top_k,
        use_cache,
    )
    return tokens


@partial(jax.jit, static_argnames=("graph", "max_new_tokens", "special", "top_k", "use_cache"))
def _generate(
    graph: Any,
    state: Any,
    source: Array,
    mask: Array | None,
    max_new_tokens: int,
    special: tuple[int, int | None, int],
    uniforms: Array | None,
    temperature: Array,
    top_k: int | None,
    use_cache: bool,
) -> Array:
    model: EncoderDecoder = nnx.merge(graph, state)
    memory = model.remember(source, mask)

    def cached(past: Any, tokens: Array, i: Array) -> tuple[Array, Any]:
        token = jax.lax.dynamic_slice_in_dim(tokens, i, 1, axis=1)
        logits, past, *_ = model.decode(token, memory, None, mask, past, i)
        return logits[:, 0], past

    def uncached(past: Any, tokens: Array, i: Array) -> tuple[Array, Any]:
        return model.decode(tokens, memory, None, mask)[0][:, i], None

    past = [empty_cache(kv, max_new_tokens) for kv in memory] if use_cache else None
    step: Any = cached if use_cache else uncached
    start_token, eos_token, pad_token = special
    start = jnp.full(len(source), start_token, source.dtype)
    return generate_tokens(
        step, past, start, max_new_tokens, eos_token, pad_token, uniforms, temperature, top_k
    )
