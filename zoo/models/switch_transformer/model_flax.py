"""The Switch Transformer in Flax NNX: the twin of model_torch.py, class by class.

Fedus 2021, https://arxiv.org/abs/2101.03961; names from transformers'
SwitchTransformersForConditionalGeneration.

B pairs of sequences, S tokens in each source and T in each target, M features, N heads of D,
V tokens in the vocabulary; X experts, each with C slots a sequence and F hidden units.
"""

from __future__ import annotations

from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import Array
from jax.typing import ArrayLike

from zoo.models.switch_transformer.config import Config, Output
from zoo.nn.attention_flax import (
    KeyValue,
    causal_mask,
    dot_product_attention,
    mask_bias,
    relative_bucket,
    write_cache,
)
from zoo.nn.generation_flax import generate
from zoo.nn.layers_flax import ACTIVATIONS
from zoo.nn.options_flax import Options
from zoo.nn.relative_positions import bucket_table
from zoo.nn.rmsnorm_flax import RMSNorm
from zoo.nn.routing_flax import Jitter, router_losses


class DenseActDense(nnx.Module):
    """The feed-forward layer of a dense block."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.wi = nnx.Linear(c.d_model, c.d_ff, use_bias=False, **kw)
        self.wo = nnx.Linear(c.d_ff, c.d_model, use_bias=False, **kw)
        self.dropout = nnx.Dropout(c.dropout_rate, rngs=kw["rngs"])
        self.act = ACTIVATIONS[c.dense_act_fn]

    def __call__(self, x: Array) -> Array:
        """(..., M) -> (..., M)."""
        return self.wo(self.dropout(self.act(self.wi(x))))


class Top1Router(nnx.Module):
    """Every token chooses one expert, which takes the first C of a sequence that choose it."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.num_experts = c.num_experts
        self.capacity = c.expert_capacity
        self.jitter = Jitter(c.router_jitter_noise, **kw)
        kw["dtype"] = None  # computes in its input's dtype: float32 or wider
        self.classifier = nnx.Linear(c.d_model, c.num_experts, use_bias=c.router_bias, **kw)

    def __call__(self, x: Array) -> tuple[Array, Array, Array]:
        """x (B, T, M) -> dispatch (B, T, X, C), weights (B, T, 1), logits (B, T, X).

        `dispatch` is 1 where a token has a slot of an expert, and 0 elsewhere; `weights` is the
        probability of the expert chosen. Logits and probabilities are in float32 or wider.
        """
        wide = self.jitter(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
        logits = self.classifier(wide)
        probabilities = jax.nn.softmax(logits, -1).astype(x.dtype)
        best = probabilities.argmax(-1, keepdims=True)  # the gradient of max compares instead
        weights = jnp.take_along_axis(probabilities, best, -1)
        chosen = jax.nn.one_hot(best[..., 0], self.num_experts, dtype=jnp.int32)
        place = chosen.cumsum(1) - 1  # how many earlier tokens of the sequence chose it
        slots = jnp.arange(min(self.capacity, x.shape[1]))
        dispatch = chosen[..., None] * (place[..., None] == slots)
        return dispatch.astype(x.dtype), weights, logits


class Experts(nnx.Module):
    """A feed-forward layer for each expert; `wi` and `wo` hold the matrices of all of them."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        initializer = nnx.initializers.lecun_normal(batch_axis=0)
        param_dtype = kw.get("param_dtype", jnp.float32)

        def matrices(n_in: int, n_out: int) -> nnx.Param:
            shape = (c.num_experts, n_in, n_out)
            return nnx.Param(initializer(kw["rngs"].params(), shape, param_dtype))

        self.wi = matrices(c.d_model, c.d_ff)
        self.wo = matrices(c.d_ff, c.d_model)
        self.dropout = nnx.Dropout(c.dropout_rate, rngs=kw["rngs"])
        self.act = ACTIVATIONS[c.dense_act_fn]
        self.dtype = kw.get("dtype")

    def __call__(self, x: Array) -> Array:
        """What is in the slots of each expert, (X, B, C, M) -> (X, B, C, M)."""
        x, wi, wo = promote_dtype((x, self.wi[...], self.wo[...]), dtype=self.dtype)
        hidden = self.dropout(self.act(jnp.einsum("xbcm,xmf->xbcf", x, wi)))
        return jnp.einsum("xbcf,xfm->xbcm", hidden, wo)


class SparseMLP(nnx.Module):
    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.router = Top1Router(c, **kw)
        self.experts = Experts(c, **kw)

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """(B, T, M) -> (B, T, M), 0 for tokens whose expert is full; router logits (B, T, X)."""
        dispatch, weights, logits = self.router(x)
        y = self.experts(jnp.einsum("btxc,btm->xbcm", dispatch, x))
        return jnp.einsum("btxc,xbcm->btm", dispatch, y) * weights, logits


class LayerFF(nnx.Module):
    def __init__(self, c: Config, is_sparse: bool, **kw: Unpack[Options]) -> None:
        self.is_sparse = is_sparse
        self.mlp = SparseMLP(c, **kw) if is_sparse else DenseActDense(c, **kw)
        self.layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon, **kw)
        self.dropout = nnx.Dropout(c.dropout_rate, rngs=kw["rngs"])

    def __call__(self, x: Array) -> tuple[Array, Array | None]:
        """(B, T, M) -> (B, T, M), and the router's logits (B, T, X); None in a dense layer."""
        y = self.layer_norm(x)
        logits = None
        if isinstance(self.mlp, SparseMLP):
            y, logits = self.mlp(y)
        else:
            y = self.mlp(y)
        return x + self.dropout(y), logits


class Attention(nnx.Module):
    """No biases, no scaling of the logits. The first of a stack has the position bias of all."""

    def __init__(
        self, c: Config, has_relative_attention_bias: bool = False, **kw: Unpack[Options]
    ) -> None:
        inner = c.num_heads * c.d_kv
        self.num_heads = c.num_heads
        self.num_buckets = c.relative_attention_num_buckets
        self.max_distance = c.relative_attention_max_distance
        self.q = nnx.Linear(c.d_model, inner, use_bias=False, **kw)
        self.k = nnx.Linear(c.d_model, inner, use_bias=False, **kw)
        self.v = nnx.Linear(c.d_model, inner, use_bias=False, **kw)
        self.o = nnx.Linear(inner, c.d_model, use_bias=False, **kw)
        if has_relative_attention_bias:
            self.relative_attention_bias = nnx.Embed(self.num_buckets, c.num_heads, **kw)
        self.dropout = nnx.Dropout(c.dropout_rate, rngs=kw["rngs"])

    def position_bias(
        self, queries: int, keys: int, position: ArrayLike, bidirectional: bool
    ) -> Array:
        """(1, N, T, S) for T queries, the first at `position`, and S keys, the first at 0."""
        table = bucket_table(self.num_buckets, self.max_distance, bidirectional)
        at = jnp.arange(queries) + position
        buckets = relative_bucket(table, at, jnp.arange(keys), bidirectional)
        return self.relative_attention_bias(buckets).transpose(2, 0, 1)[None]

    def keys_values(self, x: Array) -> KeyValue:
        """x (B, S, M) -> the keys and values to attend to."""
        return KeyValue(self._heads(self.k(x)), self._heads(self.v(x)))

    def __call__(self, x: Array, attended: KeyValue, bias: Array | None = None) -> Array:
        """(B, T, M) -> (B, T, M); `bias`, added to the logits, broadcasts to (B, N, T, S)."""
        query = self._heads(self.q(x))
        bias = None if bias is None else bias.astype(query.dtype)
        out = dot_product_attention(query, *attended, bias, self.dropout, 1.0)
        return self.o(out.reshape(*out.shape[:2], -1))

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)


class LayerSelfAttention(nnx.Module):
    def __init__(self, c: Config, has_relative_attention_bias: bool, **kw: Unpack[Options]) -> None:
        self.SelfAttention = Attention(c, has_relative_attention_bias, **kw)
        self.layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon, **kw)
        self.dropout = nnx.Dropout(c.dropout_rate, rngs=kw["rngs"])

    def __call__(
        self,
        x: Array,
        bias: Array | None = None,
        past: KeyValue | None = None,
        position: ArrayLike = 0,
    ) -> tuple[Array, KeyValue]:
        """(B, T, M) -> (B, T, M), and the cache with the keys and values of these positions."""
        y = self.layer_norm(x)
        cache = self.SelfAttention.keys_values(y)
        if past is not None:
            cache = write_cache(past, cache, position)
        return x + self.dropout(self.SelfAttention(y, cache, bias)), cache


class LayerCrossAttention(nnx.Module):
    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.EncDecAttention = Attention(c, **kw)
        self.layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon, **kw)
        self.dropout = nnx.Dropout(c.dropout_rate, rngs=kw["rngs"])

    def __call__(self, x: Array, memory: KeyValue, bias: Array | None = None) -> Array:
        """(B, T, M) -> (B, T, M)."""
        return x + self.dropout(self.EncDecAttention(self.layer_norm(x), memory, bias))


class Block(nnx.Module):
    """Self-attention, attention to the source in a decoder, and the feed-forward layer."""

    def __init__(self, c: Config, decoder: bool, i: int, **kw: Unpack[Options]) -> None:
        self.decoder = decoder
        layer: list[Any] = [LayerSelfAttention(c, i == 0, **kw)]
        if decoder:
            layer.append(LayerCrossAttention(c, **kw))
        layer.append(LayerFF(c, c.is_sparse(decoder, i), **kw))
        self.layer = nnx.List(layer)

    def __call__(
        self,
        x: Array,
        bias: Array | None = None,
        memory: KeyValue | None = None,
        memory_bias: Array | None = None,
        past: KeyValue | None = None,
        position: ArrayLike = 0,
    ) -> tuple[Array, KeyValue, Array | None]:
        """(B, T, M) -> (B, T, M), the cache, and the router's logits; None in a dense block."""
        x, cache = self.layer[0](x, bias, past, position)
        if self.decoder:
            x = self.layer[1](x, memory, memory_bias)
        x, logits = self.layer[-1](x)
        return x, cache, logits


class Stack(nnx.Module):
    """The encoder or the decoder."""

    def __init__(self, c: Config, decoder: bool, **kw: Unpack[Options]) -> None:
        self.decoder = decoder
        layers = c.num_decoder_layers if decoder else c.num_layers
        self.block = nnx.List(Block(c, decoder, i, **kw) for i in range(layers))
        self.final_layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon, **kw)
        self.dropout = nnx.Dropout(c.dropout_rate, rngs=kw["rngs"])

    def keys_values(self, memory: Array) -> list[KeyValue]:
        """memory (B, S, M) -> its keys and values for each block, to compute them only once."""
        return [block.layer[1].EncDecAttention.keys_values(memory) for block in self.block]

    def __call__(
        self,
        x: Array,
        mask: Array | None = None,
        memory: list[KeyValue] | None = None,
        memory_mask: Array | None = None,
        past: list[KeyValue] | None = None,
        position: ArrayLike = 0,
    ) -> tuple[Array, list[KeyValue], list[Array]]:
        """(B, T, M) -> (B, T, M), the cache of each block, and the logits of each router.

        Masks are (B, T) and (B, S), 0 for padding. With `past`, x begins at `position`, and attends
        to what the caches hold before that.
        """
        T = x.shape[1]
        keys = T if past is None else past[0].key.shape[1]
        first = self.block[0].layer[0].SelfAttention  # its position bias serves all blocks
        bias = first.position_bias(T, keys, position, not self.decoder)
        allowed = None if mask is None else mask.astype(bool)[:, None, None, :]
        if self.decoder:
            causal = causal_mask(T, keys, position)[None, None]
            allowed = causal if allowed is None else causal & allowed
        if allowed is not None:
            bias = bias + mask_bias(allowed, bias.dtype)
        memory_bias = (
            None if memory_mask is None else mask_bias(memory_mask[:, None, None, :], x.dtype)
        )
        x = self.dropout(x)
        caches, router_logits = [], []
        for i, block in enumerate(self.block):
            source = None if memory is None else memory[i]
            before = None if past is None else past[i]
            x, cache, logits = block(x, bias, source, memory_bias, before, position)
            caches.append(cache)
            if logits is not None:
                router_logits.append(logits)
        return self.dropout(self.final_layer_norm(x)), caches, router_logits


class SwitchTransformer(nnx.Module):
    """Encoder, decoder and language-model head over one vocabulary."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.config = c
        self.shared = nnx.Embed(c.vocab_size, c.d_model, **kw)
        self.encoder = Stack(c, decoder=False, **kw)
        self.decoder = Stack(c, decoder=True, **kw)
        self.lm_head = (
            None
            if c.tie_word_embeddings
            else nnx.Linear(c.d_model, c.vocab_size, use_bias=False, **kw)
        )

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        decoder_input_ids: Array | None = None,
        decoder_attention_mask: Array | None = None,
    ) -> Output:
        """ids (B, S) and decoder ids (B, T) -> Output, whose logits at t predict token t + 1.

        Masks are (B, S) and (B, T), 1 for tokens and 0 for padding. Decoder ids are the start token
        alone by default.
        """
        if decoder_input_ids is None:
            start = self.config.decoder_start_token_id
            decoder_input_ids = jnp.full_like(input_ids[:, :1], start)
        x, router_logits = self.encode(input_ids, attention_mask)
        memory = self.decoder.keys_values(x)
        logits, _, decoder_router_logits = self.decode(
            decoder_input_ids, memory, decoder_attention_mask, attention_mask
        )
        return Output(
            logits,
            *router_losses(router_logits, x),
            *router_losses(decoder_router_logits, x),
            x,
            tuple(router_logits),
            tuple(decoder_router_logits),
        )

    def encode(
        self, input_ids: Array, attention_mask: Array | None = None
    ) -> tuple[Array, list[Array]]:
        """ids (B, S) -> memory (B, S, M), and the logits of each router."""
        x, _, router_logits = self.encoder(self.shared(input_ids), attention_mask)
        return x, router_logits

    def remember(self, input_ids: Array, attention_mask: Array | None = None) -> list[KeyValue]:
        """ids (B, S) -> the memory's keys and values for each block of the decoder."""
        return self.decoder.keys_values(self.encode(input_ids, attention_mask)[0])

    def decode(
        self,
        decoder_input_ids: Array,
        memory: list[KeyValue],
        decoder_attention_mask: Array | None = None,
        attention_mask: Array | None = None,
        past: list[KeyValue] | None = None,
        position: ArrayLike = 0,
    ) -> tuple[Array, list[KeyValue], list[Array]]:
        """ids (B, T), the first at `position` -> logits (B, T, V), caches, logits of each router.

        `memory` is what `remember` returned. `past` holds the keys and values of earlier positions,
        in buffers of fixed length; None: these ids are the whole sequence so far.
        """
        x = self.shared(decoder_input_ids)
        x, caches, router_logits = self.decoder(
            x, decoder_attention_mask, memory, attention_mask, past, position
        )
        if self.lm_head is None:
            logits = self.shared.attend(x * self.config.d_model**-0.5)
        else:
            logits = self.lm_head(x)
        return logits, caches, router_logits

    def generate(
        self,
        input_ids: Array,
        max_new_tokens: int,
        start_token: int | None = None,
        eos_token: int | None = None,
        pad_token: int | None = None,
        attention_mask: Array | None = None,
        uniforms: Array | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        use_cache: bool = True,
    ) -> Array:
        """ids (B, S) -> tokens (B, max_new_tokens), padded after `eos_token`; in eval mode.

        Special tokens are the config's by default. Each token is the likeliest, or, with `uniforms`
        (B, max_new_tokens) in [0, 1), drawn by these numbers (`choose_token`), so that both
        frameworks draw the same. `use_cache=False` decodes all positions anew for every token:
        experts then fill up as in training, while a token decoded by itself always finds room.
        """
        c = self.config
        special = (
            c.decoder_start_token_id if start_token is None else start_token,
            c.eos_token_id if eos_token is None else eos_token,
            c.pad_token_id if pad_token is None else pad_token,
        )
        return generate(
            self,
            input_ids,
            attention_mask,
            max_new_tokens,
            special,
            uniforms,
            temperature,
            top_k,
            use_cache,
        )
