"""BERT in Flax NNX: the twin of model_torch.py, class by class.

Devlin 2018, https://arxiv.org/abs/1810.04805; names from transformers.

    model = BertModel(Config(), rngs=nnx.Rngs(0))
    model.eval()  # it starts in training mode
    x, pooled = model(input_ids, attention_mask)  # (B, T, H), (B, H)

B sequences, T tokens in each, H hidden units, N heads of D = H / N, V tokens in the vocabulary.
`**kw` is `dtype`, `param_dtype` and `rngs`, which every layer takes.
"""

from __future__ import annotations

from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from jax import Array

from zoo.models.bert.config import (
    HEADS,
    Config,
    Output,
    PreTrainingOutput,
    QuestionAnsweringOutput,
    check_length,
)
from zoo.nn.attention_flax import dot_product_attention, mask_bias
from zoo.nn.layers_flax import ACTIVATIONS, Embed, LayerNorm
from zoo.nn.options_flax import Options


class BertEmbeddings(nnx.Module):
    """The sum of word, position and token type embeddings, normalized."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        pad = c.pad_token_id
        self.word_embeddings = Embed(c.vocab_size, c.hidden_size, padding_idx=pad, **kw)
        self.position_embeddings = nnx.Embed(c.max_position_embeddings, c.hidden_size, **kw)
        self.token_type_embeddings = nnx.Embed(c.type_vocab_size, c.hidden_size, **kw)
        self.LayerNorm = LayerNorm(c.hidden_size, c.layer_norm_eps, **kw)
        self.dropout = nnx.Dropout(c.hidden_dropout_prob, rngs=kw["rngs"])

    def __call__(self, input_ids: Array, token_type_ids: Array, position_ids: Array) -> Array:
        """ids (B, T) each -> (B, T, H)."""
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        x = x + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(x))


class BertSelfAttention(nnx.Module):
    """Multi-head attention without the output projection, which is BertSelfOutput's."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.heads = c.num_attention_heads
        self.query = nnx.Linear(c.hidden_size, c.hidden_size, **kw)
        self.key = nnx.Linear(c.hidden_size, c.hidden_size, **kw)
        self.value = nnx.Linear(c.hidden_size, c.hidden_size, **kw)
        self.dropout = nnx.Dropout(c.attention_probs_dropout_prob, rngs=kw["rngs"])

    def __call__(self, x: Array, bias: Array | None = None) -> Array:
        """(B, T, H) -> (B, T, H); `bias` (B, 1, 1, T), added to the logits, hides the padding."""
        B, T, H = x.shape
        q = self.query(x).reshape(B, T, self.heads, -1)
        k = self.key(x).reshape(B, T, self.heads, -1)
        v = self.value(x).reshape(B, T, self.heads, -1)
        bias = None if bias is None else bias.astype(q.dtype)
        return dot_product_attention(q, k, v, bias, self.dropout).reshape(B, T, H)


class BertSelfOutput(nnx.Module):
    """A projection, the residual sum and its norm; upstream's BertOutput is the same class here."""

    def __init__(self, c: Config, n_in: int, **kw: Unpack[Options]) -> None:
        self.dense = nnx.Linear(n_in, c.hidden_size, **kw)
        self.LayerNorm = LayerNorm(c.hidden_size, c.layer_norm_eps, **kw)
        self.dropout = nnx.Dropout(c.hidden_dropout_prob, rngs=kw["rngs"])

    def __call__(self, x: Array, residual: Array) -> Array:
        """x (B, T, n_in), residual (B, T, H) -> (B, T, H)."""
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class BertAttention(nnx.Module):
    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.self = BertSelfAttention(c, **kw)
        self.output = BertSelfOutput(c, c.hidden_size, **kw)

    def __call__(self, x: Array, bias: Array | None = None) -> Array:
        """(B, T, H) -> (B, T, H)."""
        return self.output(self.self(x, bias), x)


class BertIntermediate(nnx.Module):
    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.dense = nnx.Linear(c.hidden_size, c.intermediate_size, **kw)
        self.activation = ACTIVATIONS[c.hidden_act]

    def __call__(self, x: Array) -> Array:
        """(B, T, H) -> (B, T, intermediate_size)."""
        return self.activation(self.dense(x))


class BertLayer(nnx.Module):
    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.attention = BertAttention(c, **kw)
        self.intermediate = BertIntermediate(c, **kw)
        self.output = BertSelfOutput(c, c.intermediate_size, **kw)

    def __call__(self, x: Array, bias: Array | None = None) -> Array:
        """(B, T, H) -> (B, T, H)."""
        x = self.attention(x, bias)
        return self.output(self.intermediate(x), x)


class BertEncoder(nnx.Module):
    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.layer = nnx.List(BertLayer(c, **kw) for _ in range(c.num_hidden_layers))

    def __call__(self, x: Array, bias: Array | None = None) -> Array:
        """(B, T, H) -> (B, T, H)."""
        for layer in self.layer:
            x = layer(x, bias)
        return x


class BertPooler(nnx.Module):
    """A summary of the sequence, from its first token."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.dense = nnx.Linear(c.hidden_size, c.hidden_size, **kw)

    def __call__(self, x: Array) -> Array:
        """(B, T, H) -> (B, H)."""
        return jnp.tanh(self.dense(x[:, 0]))


class BertModel(nnx.Module):
    """The encoder, and a pooler where the config has one."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.embeddings = BertEmbeddings(c, **kw)
        self.encoder = BertEncoder(c, **kw)
        self.pooler = BertPooler(c, **kw) if c.pooler else None

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
    ) -> Output:
        """ids (B, T), mask (B, T), 1 for tokens and 0 for padding -> Output.

        By default there is no padding, all tokens are of type 0, and positions count from 0.
        """
        if attention_mask is None:
            attention_mask = jnp.ones_like(input_ids)
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        if position_ids is None:
            check_length(input_ids.shape[1], self.embeddings.position_embeddings.num_embeddings)
            position_ids = jnp.arange(input_ids.shape[1])[None]
        x = self.embeddings(input_ids, token_type_ids, position_ids)
        bias = mask_bias(attention_mask[:, None, None, :], x.dtype)
        x = self.encoder(x, bias)
        return Output(x, None if self.pooler is None else self.pooler(x))


class BertPredictionHeadTransform(nnx.Module):
    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.dense = nnx.Linear(c.hidden_size, c.hidden_size, **kw)
        self.activation = ACTIVATIONS[c.hidden_act]
        self.LayerNorm = LayerNorm(c.hidden_size, c.layer_norm_eps, **kw)

    def __call__(self, x: Array) -> Array:
        """(B, T, H) -> (B, T, H)."""
        return self.LayerNorm(self.activation(self.dense(x)))


class BertLMPredictionHead(nnx.Module):
    """Logits over the vocabulary, by the matrix of the word embeddings, or by one of its own.

    The embeddings come with the call: held here too, they would have two names in the state.
    """

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.transform = BertPredictionHeadTransform(c, **kw)
        H, V, tied = c.hidden_size, c.vocab_size, c.tie_decoder_bias
        self.decoder = None if c.tie_word_embeddings else nnx.Linear(H, V, use_bias=not tied, **kw)
        self.bias = nnx.Param(jnp.zeros(V, kw.get("param_dtype", jnp.float32))) if tied else None

    def __call__(self, x: Array, embeddings: Embed) -> Array:
        """(B, T, H) -> logits (B, T, V)."""
        x = self.transform(x)
        logits = embeddings.attend(x) if self.decoder is None else self.decoder(x)
        return logits if self.bias is None else logits + self.bias[...].astype(logits.dtype)


class BertPreTrainingHeads(nnx.Module):
    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        head = HEADS[c.head]
        self.predictions = BertLMPredictionHead(c, **kw) if head.words else None
        self.seq_relationship = nnx.Linear(c.hidden_size, 2, **kw) if head.pooled else None

    def __call__(
        self, x: Array, pooled: Array | None, embeddings: Embed
    ) -> Array | PreTrainingOutput:
        """x (B, T, H), pooled (B, H) -> logits (B, T, V) of tokens, (B, 2) of the next sentence."""
        if self.predictions is None:
            assert self.seq_relationship is not None
            assert pooled is not None
            return self.seq_relationship(pooled)
        if self.seq_relationship is None or pooled is None:
            return self.predictions(x, embeddings)
        return PreTrainingOutput(self.predictions(x, embeddings), self.seq_relationship(pooled))


class BertForPreTraining(nnx.Module):
    """Masked tokens and the next sentence; with other heads one of the two."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.bert = BertModel(c, **kw)
        self.cls = BertPreTrainingHeads(c, **kw)

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
    ) -> Array | PreTrainingOutput:
        """Takes what BertModel takes."""
        x, pooled = self.bert(input_ids, attention_mask, token_type_ids, position_ids)
        return self.cls(x, pooled, self.bert.embeddings.word_embeddings)


class BertForClassification(nnx.Module):
    """Logits of L labels: (B, L) for the sequence, by its pooler, or (B, T, L) for its tokens."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.per_token = c.head == "token_classification"
        self.bert = BertModel(c, **kw)
        rate = c.hidden_dropout_prob if c.classifier_dropout is None else c.classifier_dropout
        self.dropout = nnx.Dropout(rate, rngs=kw["rngs"])
        self.classifier = nnx.Linear(c.hidden_size, c.num_labels, **kw)

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
    ) -> Array:
        """Takes what BertModel takes."""
        x, pooled = self.bert(input_ids, attention_mask, token_type_ids, position_ids)
        return self.classifier(self.dropout(x if self.per_token else pooled))


class BertForMultipleChoice(nnx.Module):
    """Logits of C texts, of which one is right: (B, C)."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.bert = BertModel(c, **kw)
        rate = c.hidden_dropout_prob if c.classifier_dropout is None else c.classifier_dropout
        self.dropout = nnx.Dropout(rate, rngs=kw["rngs"])
        self.classifier = nnx.Linear(c.hidden_size, 1, **kw)

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
    ) -> Array:
        """Takes what BertModel takes, (B, C, T) each."""
        rest = (attention_mask, token_type_ids, position_ids)
        flat = (None if x is None else x.reshape(-1, x.shape[-1]) for x in rest)
        _, pooled = self.bert(input_ids.reshape(-1, input_ids.shape[-1]), *flat)
        return self.classifier(self.dropout(pooled)).reshape(input_ids.shape[:2])


class BertForQuestionAnswering(nnx.Module):
    """Logits of each token to begin, and to end, an answer."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.bert = BertModel(c, **kw)
        self.qa_outputs = nnx.Linear(c.hidden_size, 2, **kw)

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
    ) -> QuestionAnsweringOutput:
        """Takes what BertModel takes."""
        x, _ = self.bert(input_ids, attention_mask, token_type_ids, position_ids)
        logits = self.qa_outputs(x)
        return QuestionAnsweringOutput(logits[..., 0], logits[..., 1])


def bert(c: Config, **kw: Unpack[Options]) -> nnx.Module:
    """The model with the head that `c.head` names."""
    if c.head == "none":
        return BertModel(c, **kw)
    if c.head in ("pretraining", "masked_lm", "next_sentence_prediction"):
        return BertForPreTraining(c, **kw)
    if c.head == "multiple_choice":
        return BertForMultipleChoice(c, **kw)
    if c.head == "question_answering":
        return BertForQuestionAnswering(c, **kw)
    return BertForClassification(c, **kw)
