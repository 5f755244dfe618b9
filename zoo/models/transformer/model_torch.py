"""The Transformer in PyTorch. Vaswani 2017, https://arxiv.org/abs/1706.03762; names from
torch.nn.Transformer.

B pairs of sequences, S tokens in each source and T in each target, E features, N heads of
D = E / N, V tokens in the target's vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from zoo.models.transformer.config import Config
from zoo.nn.attention_torch import KeyValue, MultiheadAttention, causal_mask, mask_bias, write_cache
from zoo.nn.generation_torch import generate
from zoo.nn.layers_torch import ACTIVATIONS, Embedding, LayerNorm, Linear
from zoo.nn.options_torch import Options
from zoo.nn.positions_torch import sinusoids


class TransformerEncoderLayer(nn.Module):
    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.norm_first = c.norm_first
        self.self_attn = MultiheadAttention(c.d_model, c.nhead, c.dropout, **kw)
        self.linear1 = Linear(c.d_model, c.dim_feedforward, **kw)
        self.activation = ACTIVATIONS[c.activation]
        self.dropout = nn.Dropout(c.dropout)
        self.linear2 = Linear(c.dim_feedforward, c.d_model, **kw)
        self.norm1 = LayerNorm(c.d_model, c.layer_norm_eps, **kw)
        self.norm2 = LayerNorm(c.d_model, c.layer_norm_eps, **kw)
        self.dropout1 = nn.Dropout(c.dropout)
        self.dropout2 = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, S, E) -> (B, S, E); `bias`, added to the logits, hides the padding."""
        if self.norm_first:
            x = x + self._attend(self.norm1(x), bias)
            return x + self._feed_forward(self.norm2(x))
        x = self.norm1(x + self._attend(x, bias))
        return self.norm2(x + self._feed_forward(x))

    def _attend(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.dropout1(self.self_attn(x, self.self_attn.keys_values(x), bias))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))


class TransformerDecoderLayer(nn.Module):
    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.norm_first = c.norm_first
        self.self_attn = MultiheadAttention(c.d_model, c.nhead, c.dropout, **kw)
        self.multihead_attn = MultiheadAttention(c.d_model, c.nhead, c.dropout, **kw)
        self.linear1 = Linear(c.d_model, c.dim_feedforward, **kw)
        self.activation = ACTIVATIONS[c.activation]
        self.dropout = nn.Dropout(c.dropout)
        self.linear2 = Linear(c.dim_feedforward, c.d_model, **kw)
        self.norm1 = LayerNorm(c.d_model, c.layer_norm_eps, **kw)
        self.norm2 = LayerNorm(c.d_model, c.layer_norm_eps, **kw)
        self.norm3 = LayerNorm(c.d_model, c.layer_norm_eps, **kw)
        self.dropout1 = nn.Dropout(c.dropout)
        self.dropout2 = nn.Dropout(c.dropout)
        self.dropout3 = nn.Dropout(c.dropout)

    def forward(
        self,
        x: Tensor,
        memory: KeyValue,
        bias: Tensor | None = None,
        memory_bias: Tensor | None = None,
        past: KeyValue | None = None,
        position: int = 0,
    ) -> tuple[Tensor, KeyValue]:
        """(B, T, E) -> (B, T, E), and the cache with the keys and values of these positions.

        `bias` hides padding and later tokens, `memory_bias` the padding of the source.
        """
        if self.norm_first:
            y, cache = self._attend_to_self(self.norm1(x), bias, past, position)
            x = x + y
            x = x + self._attend(self.norm2(x), memory, memory_bias)
            return x + self._feed_forward(self.norm3(x)), cache
        y, cache = self._attend_to_self(x, bias, past, position)
        x = self.norm1(x + y)
        x = self.norm2(x + self._attend(x, memory, memory_bias))
        return self.norm3(x + self._feed_forward(x)), cache

    def _attend_to_self(
        self, x: Tensor, bias: Tensor | None, past: KeyValue | None, position: int
    ) -> tuple[Tensor, KeyValue]:
        cache = self.self_attn.keys_values(x)
        if past is not None:
            cache = write_cache(past, cache, position)
        return self.dropout1(self.self_attn(x, cache, bias)), cache

    def _attend(self, x: Tensor, memory: KeyValue, bias: Tensor | None) -> Tensor:
        return self.dropout2(self.multihead_attn(x, memory, bias))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout3(self.linear2(self.dropout(self.activation(self.linear1(x)))))


class TransformerEncoder(nn.Module):
    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        layers = (TransformerEncoderLayer(c, **kw) for _ in range(c.num_encoder_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = LayerNorm(c.d_model, c.layer_norm_eps, **kw)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, S, E) -> memory (B, S, E)."""
        for layer in self.layers:
            x = layer(x, bias)
        return self.norm(x)


class TransformerDecoder(nn.Module):
    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        layers = (TransformerDecoderLayer(c, **kw) for _ in range(c.num_decoder_layers))
        self.layers: Any = nn.ModuleList(layers)
        self.norm = LayerNorm(c.d_model, c.layer_norm_eps, **kw)

    def keys_values(self, memory: Tensor) -> list[KeyValue]:
        """memory (B, S, E) -> its keys and values for each layer, to compute them only once."""
        return [layer.multihead_attn.keys_values(memory) for layer in self.layers]

    def forward(
        self,
        x: Tensor,
        memory: list[KeyValue],
        memory_bias: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        past: list[KeyValue] | None = None,
        position: int = 0,
    ) -> tuple[Tensor, list[KeyValue]]:
        """(B, T, E) -> (B, T, E), and the cache of each layer.

        With `past`, x begins at `position`, and attends to what the caches hold before that.
        """
        T = x.shape[1]
        keys = T if past is None else past[0].key.shape[1]
        mask = causal_mask(T, keys, position, x.device)[None, None]
        if tgt_key_padding_mask is not None:
            mask = mask & ~tgt_key_padding_mask.bool()[:, None, None, :]
        bias = mask_bias(mask, x.dtype)
        caches = []
        for i, layer in enumerate(self.layers):
            before = None if past is None else past[i]
            x, cache = layer(x, memory[i], bias, memory_bias, before, position)
            caches.append(cache)
        return self.norm(x), caches


class Generator(Linear):
    """Logits by a matrix of its own, or, with `tie_embeddings`, by that of the embeddings."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__(c.d_model, c.tgt_vocab_size, **kw)


class Transformer(nn.Module):
    """torch.nn.Transformer, batch first, between embeddings and a generator of logits."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.d_model = c.d_model
        self.src_embedding = Embedding(c.src_vocab_size, c.d_model, **kw)
        self.tgt_embedding = (
            self.src_embedding if c.tie_embeddings else Embedding(c.tgt_vocab_size, c.d_model, **kw)
        )
        self.encoder = TransformerEncoder(c, **kw)
        self.decoder = TransformerDecoder(c, **kw)
        self.generator = Generator(c, **kw)
        self.dropout = nn.Dropout(c.dropout)
        if c.tie_embeddings:
            self.generator.weight = self.src_embedding.weight

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """src (B, S) and tgt (B, T) ids -> logits (B, T, V): those at t predict token t + 1.

        Masks are (B, S) or (B, T), true for padding, which is not attended to; the memory's is that
        of the source by default. No token of tgt attends to a later one.
        """
        if memory_key_padding_mask is None:
            memory_key_padding_mask = src_key_padding_mask
        memory = self.remember(src, src_key_padding_mask)
        return self.decode(tgt, memory, tgt_key_padding_mask, memory_key_padding_mask)[0]

    def encode(self, src: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        """src (B, S) ids -> memory (B, S, E)."""
        x = self._embed(self.src_embedding, src, 0, src.shape[1])
        return self.encoder(x, _bias(src_key_padding_mask, x.dtype))

    def remember(self, src: Tensor, src_key_padding_mask: Tensor | None = None) -> list[KeyValue]:
        """src (B, S) ids -> the memory's keys and values for each layer of the decoder."""
        return self.decoder.keys_values(self.encode(src, src_key_padding_mask))

    def decode(
        self,
        tgt: Tensor,
        memory: list[KeyValue],
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        past: list[KeyValue] | None = None,
        position: int = 0,
    ) -> tuple[Tensor, list[KeyValue]]:
        """tgt (B, T) ids, the first at `position` -> logits (B, T, V), and the cache of each layer.

        `memory` is what `remember` returned. `past` holds the keys and values of earlier positions,
        in buffers of fixed length; None: tgt is the whole sequence so far.
        """
        length = tgt.shape[1] if past is None else past[0].key.shape[1]
        x = self._embed(self.tgt_embedding, tgt, position, length)
        memory_bias = _bias(memory_key_padding_mask, x.dtype)
        x, caches = self.decoder(x, memory, memory_bias, tgt_key_padding_mask, past, position)
        return self.generator(x), caches

    def generate(
        self,
        src: Tensor,
        max_new_tokens: int,
        start_token: int,
        eos_token: int | None = None,
        pad_token: int = 0,
        src_key_padding_mask: Tensor | None = None,
        uniforms: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """src (B, S) ids -> tokens (B, max_new_tokens), padded after `eos_token`; in eval mode.

        Each token is the likeliest, or, with `uniforms` (B, max_new_tokens) in [0, 1), drawn by
        these numbers (`choose_token`), so that both frameworks draw the same. `use_cache=False`
        decodes all positions anew for every token.
        """
        special = start_token, eos_token, pad_token
        return generate(
            self,
            src,
            src_key_padding_mask,
            max_new_tokens,
            special,
            uniforms,
            temperature,
            top_k,
            use_cache,
        )

    def _embed(self, words: Embedding, ids: Tensor, position: int, length: int) -> Tensor:
        """ids (B, T), the first at `position`, all positions below `length` -> (B, T, E)."""
        x = words(ids) * math.sqrt(self.d_model)
        at = torch.arange(ids.shape[1], device=x.device) + position
        return self.dropout(x + sinusoids(at, length, self.d_model, x.dtype))


class BareTransformer(nn.Module):
    """torch.nn.Transformer itself, batch first: of vectors, without embeddings, and with the masks
    that it is given and no other."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.encoder = TransformerEncoder(c, **kw)
        self.decoder = TransformerDecoder(c, **kw)

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """src (B, S, E) and tgt (B, T, E) -> (B, T, E).

        Masks are booleans, true for what is hidden: (queries, keys), and (B, keys) for padding.
        """
        memory = self.encoder(src, _hidden(src_mask, src_key_padding_mask, src.dtype))
        x, bias = tgt, _hidden(tgt_mask, tgt_key_padding_mask, tgt.dtype)
        memory_bias = _hidden(memory_mask, memory_key_padding_mask, tgt.dtype)
        for layer in self.decoder.layers:
            x, _ = layer(x, layer.multihead_attn.keys_values(memory), bias, memory_bias)
        return self.decoder.norm(x)


def transformer(c: Config, **kw: Unpack[Options]) -> Transformer | BareTransformer:
    """The model with words around it, or without, as the config says."""
    return BareTransformer(c, **kw) if c.bare else Transformer(c, **kw)


def _hidden(mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """(T, S) and (B, S), true for what is hidden -> what is added to the logits of attention."""
    hidden = None if mask is None else mask.bool()[None, None]
    if padding is not None:
        apart = padding.bool()[:, None, None, :]
        hidden = apart if hidden is None else hidden | apart
    return None if hidden is None else mask_bias(~hidden, dtype)


def _bias(padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """(B, S), true for padding -> (B, 1, 1, S), to add to the logits of attention."""
    return None if padding is None else mask_bias(~padding.bool()[:, None, None, :], dtype)
