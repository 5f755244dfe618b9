"""BERT in PyTorch. Devlin 2018, https://arxiv.org/abs/1810.04805; names from transformers.

    model = BertModel(Config())
    model.eval()  # it starts in training mode
    x, pooled = model(input_ids, attention_mask)  # (B, T, H), (B, H)

B sequences, T tokens in each, H hidden units, N heads of D = H / N, V tokens in the vocabulary.
`**kw` is `dtype` and `param_dtype`, which every layer takes.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from zoo.models.bert.config import (
    HEADS,
    Config,
    Output,
    PreTrainingOutput,
    QuestionAnsweringOutput,
    check_length,
)
from zoo.nn.attention_torch import dot_product_attention, mask_bias
from zoo.nn.layers_torch import ACTIVATIONS, Embedding, LayerNorm, Linear
from zoo.nn.options_torch import Options


class BertEmbeddings(nn.Module):
    """The sum of word, position and token type embeddings, normalized."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        pad = c.pad_token_id
        self.word_embeddings = Embedding(c.vocab_size, c.hidden_size, padding_idx=pad, **kw)
        self.position_embeddings = Embedding(c.max_position_embeddings, c.hidden_size, **kw)
        self.token_type_embeddings = Embedding(c.type_vocab_size, c.hidden_size, **kw)
        self.LayerNorm = LayerNorm(c.hidden_size, c.layer_norm_eps, **kw)
        self.dropout = nn.Dropout(c.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor:
        """ids (B, T) each -> (B, T, H)."""
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        x = x + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(x))


class BertSelfAttention(nn.Module):
    """Multi-head attention without the output projection, which is BertSelfOutput's."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.heads = c.num_attention_heads
        self.query = Linear(c.hidden_size, c.hidden_size, **kw)
        self.key = Linear(c.hidden_size, c.hidden_size, **kw)
        self.value = Linear(c.hidden_size, c.hidden_size, **kw)
        self.dropout = nn.Dropout(c.attention_probs_dropout_prob)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, T, H) -> (B, T, H); `bias` (B, 1, 1, T), added to the logits, hides the padding."""
        B, T, H = x.shape
        q = self.query(x).view(B, T, self.heads, -1)
        k = self.key(x).view(B, T, self.heads, -1)
        v = self.value(x).view(B, T, self.heads, -1)
        bias = None if bias is None else bias.to(q.dtype)
        dropout = self.dropout.p if self.training else 0.0
        return dot_product_attention(q, k, v, bias, dropout).reshape(B, T, H)


class BertSelfOutput(nn.Module):
    """A projection, the residual sum and its norm; upstream's BertOutput is the same class here."""

    def __init__(self, c: Config, n_in: int, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.dense = Linear(n_in, c.hidden_size, **kw)
        self.LayerNorm = LayerNorm(c.hidden_size, c.layer_norm_eps, **kw)
        self.dropout = nn.Dropout(c.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x (B, T, n_in), residual (B, T, H) -> (B, T, H)."""
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class BertAttention(nn.Module):
    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.self = BertSelfAttention(c, **kw)
        self.output = BertSelfOutput(c, c.hidden_size, **kw)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        return self.output(self.self(x, bias), x)


class BertIntermediate(nn.Module):
    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.dense = Linear(c.hidden_size, c.intermediate_size, **kw)
        self.activation = ACTIVATIONS[c.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H) -> (B, T, intermediate_size)."""
        return self.activation(self.dense(x))


class BertLayer(nn.Module):
    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.attention = BertAttention(c, **kw)
        self.intermediate = BertIntermediate(c, **kw)
        self.output = BertSelfOutput(c, c.intermediate_size, **kw)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        x = self.attention(x, bias)
        return self.output(self.intermediate(x), x)


class BertEncoder(nn.Module):
    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(c, **kw) for _ in range(c.num_hidden_layers))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        for layer in self.layer:
            x = layer(x, bias)
        return x


class BertPooler(nn.Module):
    """A summary of the sequence, from its first token."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.dense = Linear(c.hidden_size, c.hidden_size, **kw)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H) -> (B, H)."""
        return torch.tanh(self.dense(x[:, 0]))


class BertModel(nn.Module):
    """The encoder, and a pooler where the config has one."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(c, **kw)
        self.encoder = BertEncoder(c, **kw)
        self.pooler = BertPooler(c, **kw) if c.pooler else None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Output:
        """ids (B, T), mask (B, T), 1 for tokens and 0 for padding -> Output.

        By default there is no padding, all tokens are of type 0, and positions count from 0.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if position_ids is None:
            check_length(input_ids.shape[1], self.embeddings.position_embeddings.num_embeddings)
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        x = self.embeddings(input_ids, token_type_ids, position_ids)
        bias = mask_bias(attention_mask[:, None, None, :], x.dtype)
        x = self.encoder(x, bias)
        return Output(x, None if self.pooler is None else self.pooler(x))


class BertPredictionHeadTransform(nn.Module):
    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.dense = Linear(c.hidden_size, c.hidden_size, **kw)
        self.activation = ACTIVATIONS[c.hidden_act]
        self.LayerNorm = LayerNorm(c.hidden_size, c.layer_norm_eps, **kw)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        return self.LayerNorm(self.activation(self.dense(x)))


class BertLMPredictionHead(nn.Module):
    """Logits over the vocabulary, by the matrix of the word embeddings, which `decoder` shares, or
    by one of its own."""

    def __init__(self, c: Config, embeddings: Embedding, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(c, **kw)
        self.decoder = Linear(c.hidden_size, c.vocab_size, **kw)
        if c.tie_word_embeddings:
            self.decoder.weight = embeddings.weight
        if c.tie_decoder_bias:
            self.bias = self.decoder.bias
        else:  # upstream has it still, and does not use it
            self.register_buffer("bias", torch.zeros_like(self.decoder.bias))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H) -> logits (B, T, V)."""
        return self.decoder(self.transform(x))


class BertPreTrainingHeads(nn.Module):
    def __init__(self, c: Config, embeddings: Embedding, **kw: Unpack[Options]) -> None:
        super().__init__()
        head = HEADS[c.head]
        self.predictions = BertLMPredictionHead(c, embeddings, **kw) if head.words else None
        self.seq_relationship = Linear(c.hidden_size, 2, **kw) if head.pooled else None

    def forward(self, x: Tensor, pooled: Tensor | None) -> Tensor | PreTrainingOutput:
        """x (B, T, H), pooled (B, H) -> logits (B, T, V) of tokens, (B, 2) of the next sentence."""
        if self.predictions is None:
            assert self.seq_relationship is not None
            return self.seq_relationship(pooled)
        if self.seq_relationship is None:
            return self.predictions(x)
        return PreTrainingOutput(self.predictions(x), self.seq_relationship(pooled))


class BertForPreTraining(nn.Module):
    """Masked tokens and the next sentence; with other heads one of the two."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.bert = BertModel(c, **kw)
        self.cls = BertPreTrainingHeads(c, self.bert.embeddings.word_embeddings, **kw)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor | PreTrainingOutput:
        """Takes what BertModel takes."""
        x, pooled = self.bert(input_ids, attention_mask, token_type_ids, position_ids)
        return self.cls(x, pooled)


class BertForClassification(nn.Module):
    """Logits of L labels: (B, L) for the sequence, by its pooler, or (B, T, L) for its tokens."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.per_token = c.head == "token_classification"
        self.bert = BertModel(c, **kw)
        rate = c.hidden_dropout_prob if c.classifier_dropout is None else c.classifier_dropout
        self.dropout = nn.Dropout(rate)
        self.classifier = Linear(c.hidden_size, c.num_labels, **kw)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Takes what BertModel takes."""
        x, pooled = self.bert(input_ids, attention_mask, token_type_ids, position_ids)
        return self.classifier(self.dropout(x if self.per_token else pooled))


class BertForMultipleChoice(nn.Module):
    """Logits of C texts, of which one is right: (B, C)."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.bert = BertModel(c, **kw)
        rate = c.hidden_dropout_prob if c.classifier_dropout is None else c.classifier_dropout
        self.dropout = nn.Dropout(rate)
        self.classifier = Linear(c.hidden_size, 1, **kw)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Takes what BertModel takes, (B, C, T) each."""
        given = (input_ids, attention_mask, token_type_ids, position_ids)
        flat = (None if x is None else x.flatten(0, 1) for x in given)
        return self.classifier(self.dropout(self.bert(*flat)[1])).view(input_ids.shape[:2])


class BertForQuestionAnswering(nn.Module):
    """Logits of each token to begin, and to end, an answer."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.bert = BertModel(c, **kw)
        self.qa_outputs = Linear(c.hidden_size, 2, **kw)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> QuestionAnsweringOutput:
        """Takes what BertModel takes."""
        x, _ = self.bert(input_ids, attention_mask, token_type_ids, position_ids)
        return QuestionAnsweringOutput(*self.qa_outputs(x).unbind(-1))


def bert(c: Config, **kw: Unpack[Options]) -> nn.Module:
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
