"""The Switch Transformer in PyTorch. Fedus 2021, https://arxiv.org/abs/2101.03961; names from
transformers' SwitchTransformersForConditionalGeneration.

B pairs of sequences, S tokens in each source and T in each target, M features, N heads of D,
V tokens in the vocabulary; X experts, each with C slots a sequence and F hidden units.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.models.switch_transformer.config import Config, Output
from zoo.nn.attention_torch import (
    KeyValue,
    causal_mask,
    dot_product_attention,
    mask_bias,
    relative_bucket,
    write_cache,
)
from zoo.nn.generation_torch import generate
from zoo.nn.layers_torch import ACTIVATIONS, Embedding, Linear
from zoo.nn.options_torch import Options
from zoo.nn.relative_positions import bucket_table
from zoo.nn.rmsnorm_torch import RMSNorm
from zoo.nn.routing_torch import Jitter, router_losses


class DenseActDense(nn.Module):
    """The feed-forward layer of a dense block, and each expert of a sparse one."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.wi = Linear(c.d_model, c.d_ff, bias=False, **kw)
        self.wo = Linear(c.d_ff, c.d_model, bias=False, **kw)
        self.dropout = nn.Dropout(c.dropout_rate)
        self.act = ACTIVATIONS[c.dense_act_fn]

    def forward(self, x: Tensor) -> Tensor:
        """(..., M) -> (..., M)."""
        return self.wo(self.dropout(self.act(self.wi(x))))


class Top1Router(nn.Module):
    """Every token chooses one expert, which takes the first C of a sequence that choose it."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.num_experts = c.num_experts
        self.capacity = c.expert_capacity
        self.jitter = Jitter(c.router_jitter_noise)
        kw["dtype"] = None  # computes in its input's dtype: float32 or wider
        self.classifier = Linear(c.d_model, c.num_experts, c.router_bias, **kw)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, M) -> dispatch (B, T, X, C), weights (B, T, 1), logits (B, T, X).

        `dispatch` is 1 where a token has a slot of an expert, and 0 elsewhere; `weights` is the
        probability of the expert chosen. Logits and probabilities are in float32 or wider.
        """
        wide = self.jitter(x.to(torch.promote_types(x.dtype, torch.float32)))
        logits = self.classifier(wide)
        probabilities = torch.softmax(logits, -1).to(x.dtype)
        weights = probabilities.max(-1, keepdim=True).values
        chosen = F.one_hot(probabilities.argmax(-1), self.num_experts)
        place = chosen.cumsum(1) - 1  # how many earlier tokens of the sequence chose it
        slots = torch.arange(min(self.capacity, x.shape[1]), device=x.device)
        dispatch = chosen[..., None] * (place[..., None] == slots)
        return dispatch.to(x.dtype), weights, logits


class Experts(nn.Module):
    """A feed-forward layer for each expert: `expert_0`, `expert_1`, ..."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        for i in range(c.num_experts):
            self.add_module(f"expert_{i}", DenseActDense(c, **kw))

    def forward(self, x: Tensor) -> Tensor:
        """What is in the slots of each expert, (X, B, C, M) -> (X, B, C, M)."""
        return torch.stack([expert(y) for expert, y in zip(self.children(), x, strict=True)])


class SparseMLP(nn.Module):
    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.router = Top1Router(c, **kw)
        self.experts = Experts(c, **kw)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, M) -> (B, T, M), 0 for tokens whose expert is full; router logits (B, T, X)."""
        dispatch, weights, logits = self.router(x)
        y = self.experts(torch.einsum("btxc,btm->xbcm", dispatch, x))
        return torch.einsum("btxc,xbcm->btm", dispatch, y) * weights, logits


class LayerFF(nn.Module):
    def __init__(self, c: Config, is_sparse: bool, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.is_sparse = is_sparse
        self.mlp = SparseMLP(c, **kw) if is_sparse else DenseActDense(c, **kw)
        self.layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon, **kw)
        self.dropout = nn.Dropout(c.dropout_rate)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, T, M) -> (B, T, M), and the router's logits (B, T, X); None in a dense layer."""
        y = self.layer_norm(x)
        y, logits = self.mlp(y) if self.is_sparse else (self.mlp(y), None)
        return x + self.dropout(y), logits


class Attention(nn.Module):
    """No biases, no scaling of the logits. The first of a stack has the position bias of all."""

    def __init__(
        self, c: Config, has_relative_attention_bias: bool = False, **kw: Unpack[Options]
    ) -> None:
        super().__init__()
        inner = c.num_heads * c.d_kv
        self.num_heads = c.num_heads
        self.num_buckets = c.relative_attention_num_buckets
        self.max_distance = c.relative_attention_max_distance
        self.q = Linear(c.d_model, inner, bias=False, **kw)
        self.k = Linear(c.d_model, inner, bias=False, **kw)
        self.v = Linear(c.d_model, inner, bias=False, **kw)
        self.o = Linear(inner, c.d_model, bias=False, **kw)
        if has_relative_attention_bias:
            self.relative_attention_bias = Embedding(self.num_buckets, c.num_heads, **kw)
        self.dropout = nn.Dropout(c.dropout_rate)

    def position_bias(self, queries: int, keys: int, position: int, bidirectional: bool) -> Tensor:
        """(1, N, T, S) for T queries, the first at `position`, and S keys, the first at 0."""
        device = self.relative_attention_bias.weight.device
        table = bucket_table(self.num_buckets, self.max_distance, bidirectional)
        at = torch.arange(queries, device=device) + position
        buckets = relative_bucket(table, at, torch.arange(keys, device=device), bidirectional)
        return self.relative_attention_bias(buckets).permute(2, 0, 1)[None]

    def keys_values(self, x: Tensor) -> KeyValue:
        """x (B, S, M) -> the keys and values to attend to."""
        heads = (self.num_heads, -1)
        return KeyValue(self.k(x).unflatten(-1, heads), self.v(x).unflatten(-1, heads))

    def forward(self, x: Tensor, attended: KeyValue, bias: Tensor | None = None) -> Tensor:
        """(B, T, M) -> (B, T, M); `bias`, added to the logits, broadcasts to (B, N, T, S)."""
        query = self.q(x).unflatten(-1, (self.num_heads, -1))
        bias = None if bias is None else bias.to(query.dtype)
        dropout = self.dropout.p if self.training else 0.0
        return self.o(dot_product_attention(query, *attended, bias, dropout, 1.0).flatten(2))


class LayerSelfAttention(nn.Module):
    def __init__(self, c: Config, has_relative_attention_bias: bool, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.SelfAttention = Attention(c, has_relative_attention_bias, **kw)
        self.layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon, **kw)
        self.dropout = nn.Dropout(c.dropout_rate)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        past: KeyValue | None = None,
        position: int = 0,
    ) -> tuple[Tensor, KeyValue]:
        """(B, T, M) -> (B, T, M), and the cache with the keys and values of these positions."""
        y = self.layer_norm(x)
        cache = self.SelfAttention.keys_values(y)
        if past is not None:
            cache = write_cache(past, cache, position)
        return x + self.dropout(self.SelfAttention(y, cache, bias)), cache


class LayerCrossAttention(nn.Module):
    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.EncDecAttention = Attention(c, **kw)
        self.layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon, **kw)
        self.dropout = nn.Dropout(c.dropout_rate)

    def forward(self, x: Tensor, memory: KeyValue, bias: Tensor | None = None) -> Tensor:
        """(B, T, M) -> (B, T, M)."""
        return x + self.dropout(self.EncDecAttention(self.layer_norm(x), memory, bias))


class Block(nn.Module):
    """Self-attention, attention to the source in a decoder, and the feed-forward layer."""

    def __init__(self, c: Config, decoder: bool, i: int, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.decoder = decoder
        layer: list[nn.Module] = [LayerSelfAttention(c, i == 0, **kw)]
        if decoder:
            layer.append(LayerCrossAttention(c, **kw))
        layer.append(LayerFF(c, c.is_sparse(decoder, i), **kw))
        self.layer = nn.ModuleList(layer)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        memory: KeyValue | None = None,
        memory_bias: Tensor | None = None,
        past: KeyValue | None = None,
        position: int = 0,
    ) -> tuple[Tensor, KeyValue, Tensor | None]:
        """(B, T, M) -> (B, T, M), the cache, and the router's logits; None in a dense block."""
        x, cache = self.layer[0](x, bias, past, position)
        if self.decoder:
            x = self.layer[1](x, memory, memory_bias)
        x, logits = self.layer[-1](x)
        return x, cache, logits


class Stack(nn.Module):
    """The encoder or the decoder."""

    def __init__(
        self, c: Config, decoder: bool, embed_tokens: Embedding, **kw: Unpack[Options]
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.embed_tokens = (
            embed_tokens  # the model's `shared` under upstream's second name; not called here
        )
        layers = c.num_decoder_layers if decoder else c.num_layers
        self.block: Any = nn.ModuleList(Block(c, decoder, i, **kw) for i in range(layers))
        self.final_layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon, **kw)
        self.dropout = nn.Dropout(c.dropout_rate)

    def keys_values(self, memory: Tensor) -> list[KeyValue]:
        """memory (B, S, M) -> its keys and values for each block, to compute them only once."""
        return [block.layer[1].EncDecAttention.keys_values(memory) for block in self.block]

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        memory: list[KeyValue] | None = None,
        memory_mask: Tensor | None = None,
        past: list[KeyValue] | None = None,
        position: int = 0,
    ) -> tuple[Tensor, list[KeyValue], list[Tensor]]:
        """(B, T, M) -> (B, T, M), the cache of each block, and the logits of each router.

        Masks are (B, T) and (B, S), 0 for padding. With `past`, x begins at `position`, and attends
        to what the caches hold before that.
        """
        T = x.shape[1]
        keys = T if past is None else past[0].key.shape[1]
        first = self.block[0].layer[0].SelfAttention  # its position bias serves all blocks
        bias = first.position_bias(T, keys, position, not self.decoder)
        allowed = None if mask is None else mask.bool()[:, None, None, :]
        if self.decoder:
            causal = causal_mask(T, keys, position, x.device)[None, None]
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


class SwitchTransformer(nn.Module):
    """Encoder, decoder and language-model head over one vocabulary."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.config = c
        self.shared = Embedding(c.vocab_size, c.d_model, **kw)
        self.encoder = Stack(c, decoder=False, embed_tokens=self.shared, **kw)
        self.decoder = Stack(c, decoder=True, embed_tokens=self.shared, **kw)
        self.lm_head = Linear(c.d_model, c.vocab_size, bias=False, **kw)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.shared.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Output:
        """ids (B, S) and decoder ids (B, T) -> Output, whose logits at t predict token t + 1.

        Masks are (B, S) and (B, T), 1 for tokens and 0 for padding. Decoder ids are the start token
        alone by default.
        """
        if decoder_input_ids is None:
            start = self.config.decoder_start_token_id
            decoder_input_ids = torch.full_like(input_ids[:, :1], start)
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
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """ids (B, S) -> memory (B, S, M), and the logits of each router."""
        x, _, router_logits = self.encoder(self.shared(input_ids), attention_mask)
        return x, router_logits

    def remember(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[KeyValue]:
        """ids (B, S) -> the memory's keys and values for each block of the decoder."""
        return self.decoder.keys_values(self.encode(input_ids, attention_mask)[0])

    def decode(
        self,
        decoder_input_ids: Tensor,
        memory: list[KeyValue],
        decoder_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past: list[KeyValue] | None = None,
        position: int = 0,
    ) -> tuple[Tensor, list[KeyValue], list[Tensor]]:
        """ids (B, T), the first at `position` -> logits (B, T, V), caches, logits of each router.

        `memory` is what `remember` returned. `past` holds the keys and values of earlier positions,
        in buffers of fixed length; None: these ids are the whole sequence so far.
        """
        x = self.shared(decoder_input_ids)
        x, caches, router_logits = self.decoder(
            x, decoder_attention_mask, memory, attention_mask, past, position
        )
        if self.config.tie_word_embeddings:
            x = x * self.config.d_model**-0.5
        return self.lm_head(x), caches, router_logits

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        start_token: int | None = None,
        eos_token: int | None = None,
        pad_token: int | None = None,
        attention_mask: Tensor | None = None,
        uniforms: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        use_cache: bool = True,
    ) -> Tensor:
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
