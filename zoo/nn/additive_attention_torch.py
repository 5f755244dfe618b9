"""Additive attention (Bahdanau 2014, appendix A.1.2) with several heads, one query at a time.

B sequences, S steps of memory, N heads of D units each, A = N * D.
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

import torch
from torch import Tensor, nn

from zoo.nn.attention_torch import mask_bias
from zoo.nn.layers_torch import Linear, promote
from zoo.nn.options_torch import Options


class Memory(NamedTuple):
    """What is attended to: the same for all queries."""

    keys: Tensor  # (B, S, N, D)
    values: Tensor  # (B, S, N, D)
    bias: Tensor  # (B, 1, S), added to the logits


class AdditiveAttention(nn.Module):
    """Logits score . tanh(query + key), and a softmax over the memory, for each head.

    Only the keys have a bias: one of the query would only be added to it.
    """

    def __init__(
        self,
        query_dim: int,
        memory_dim: int,
        size: int,
        heads: int,
        **kw: Unpack[Options],
    ) -> None:
        super().__init__()
        self.heads = heads
        self.dtype = kw.get("dtype")
        bound = (size // heads) ** -0.5
        score = torch.empty(heads, size // heads, dtype=kw.get("param_dtype", torch.float32))
        self.score = nn.Parameter(score.uniform_(-bound, bound))
        self.query = Linear(query_dim, size, bias=False, **kw)
        self.key = Linear(memory_dim, size, **kw)
        self.value = Linear(memory_dim, size, **kw)
        self.out = Linear(size, size, **kw)

    def memory(self, x: Tensor, mask: Tensor) -> Memory:
        """x (B, S, memory_dim); mask (B, S), true where there is something to attend to."""
        B, S, _ = x.shape
        keys = self.key(x).view(B, S, self.heads, -1)
        values = self.value(x).view(B, S, self.heads, -1)
        return Memory(keys, values, mask_bias(mask[:, None], keys.dtype))

    def forward(self, query: Tensor, memory: Memory, keep: Tensor) -> tuple[Tensor, Tensor]:
        """query (B, query_dim) -> the context (B, A), and the attention weights (B, N, S).

        `keep` broadcasts to the weights and multiplies them: dropout that was drawn beforehand.
        """
        B = query.shape[0]
        q = self.query(query).view(B, 1, self.heads, -1)
        energy, score = promote(self.dtype, torch.tanh(q + memory.keys), self.score)
        logits = torch.einsum("bsnd,nd->bns", energy, score) + memory.bias
        weights = torch.softmax(logits, dim=-1)
        kept = weights * keep.to(weights.dtype)
        context = torch.einsum("bns,bsnd->bnd", kept, memory.values).reshape(B, -1)
        return self.out(context), weights
