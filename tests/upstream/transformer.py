"""The paper's Transformer of torch's own classes."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from upstream import Document, Upstream
from zoo.models.transformer import MODEL
from zoo.models.transformer.config import Config


class Seq2Seq(torch.nn.Transformer):
    """What the paper says, written with torch's own classes."""

    def __init__(self, c: Config) -> None:
        with warnings.catch_warnings(action="ignore"):  # norm_first: no nested tensors
            super().__init__(
                c.d_model,
                c.nhead,
                c.num_encoder_layers,
                c.num_decoder_layers,
                c.dim_feedforward,
                c.dropout,
                c.activation,
                layer_norm_eps=c.layer_norm_eps,
                batch_first=True,
                norm_first=c.norm_first,
            )
        if c.bare:
            return
        self.src_embedding = torch.nn.Embedding(c.src_vocab_size, c.d_model)
        self.tgt_embedding = torch.nn.Embedding(c.tgt_vocab_size, c.d_model)
        self.generator = torch.nn.Linear(c.d_model, c.tgt_vocab_size)
        if c.tie_embeddings:
            self.tgt_embedding.weight = self.generator.weight = self.src_embedding.weight

    def embed(self, words: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        positions = np.zeros((ids.shape[1], self.d_model))
        for p in range(ids.shape[1]):
            for i in range(0, self.d_model, 2):
                positions[p, i] = math.sin(p / 10000 ** (i / self.d_model))
                positions[p, i + 1] = math.cos(p / 10000 ** (i / self.d_model))
        x = words(ids) * self.d_model**0.5
        return x + torch.from_numpy(positions).to(x.dtype)

    def forward(
        self,
        src: Any,
        tgt: Any,
        src_key_padding_mask: Any = None,
        tgt_key_padding_mask: Any = None,
        tgt_mask: Any = None,
    ) -> Any:
        src_pad, tgt_pad = src_key_padding_mask, tgt_key_padding_mask
        if tgt_mask is not None:  # bare
            return super().forward(
                src,
                tgt,
                tgt_mask=tgt_mask,
                src_key_padding_mask=src_pad,
                tgt_key_padding_mask=tgt_pad,
            )
        T = tgt.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool).triu(1)
        x = super().forward(
            self.embed(self.src_embedding, src),
            self.embed(self.tgt_embedding, tgt),
            tgt_mask=causal,
            src_key_padding_mask=src_pad,
            tgt_key_padding_mask=tgt_pad,
            memory_key_padding_mask=src_pad,
        )
        return self.generator(x)


SMALL = MODEL.presets["transformer_small"]  # of a preset's size, so that the heads are known too
UNTIED = replace(SMALL, tie_embeddings=False)  # and so is a file read that has every name

UPSTREAM = Upstream(
    Seq2Seq,
    documents={
        "tied": Document(UNTIED, lambda: Seq2Seq(SMALL)),
        "untied": Document(UNTIED, lambda: Seq2Seq(UNTIED)),
    },
)
