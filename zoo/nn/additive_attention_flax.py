"""Additive attention (Bahdanau 2014, appendix A.1.2) with several heads, one query at a time.

B sequences, S steps of memory, N heads of D units each, A = N * D.
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import Array

from zoo.nn.attention_flax import mask_bias
from zoo.nn.options_flax import Options


class Memory(NamedTuple):
    """What is attended to: the same for all queries."""

    keys: Array  # (B, S, N, D)
    values: Array  # (B, S, N, D)
    bias: Array  # (B, 1, S), added to the logits


class AdditiveAttention(nnx.Module):
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
        self.heads = heads
        self.dtype = kw.get("dtype")
        bound = (size // heads) ** -0.5
        shape, param_dtype = (heads, size // heads), kw.get("param_dtype", jnp.float32)
        score = jax.random.uniform(kw["rngs"].params(), shape, param_dtype, -bound, bound)
        self.score = nnx.Param(score)
        self.query = nnx.Linear(query_dim, size, use_bias=False, **kw)
        self.key = nnx.Linear(memory_dim, size, **kw)
        self.value = nnx.Linear(memory_dim, size, **kw)
        self.out = nnx.Linear(size, size, **kw)

    def memory(self, x: Array, mask: Array) -> Memory:
        """x (B, S, memory_dim); mask (B, S), true where there is something to attend to."""
        B, S, _ = x.shape
        keys = self.key(x).reshape(B, S, self.heads, -1)
        values = self.value(x).reshape(B, S, self.heads, -1)
        return Memory(keys, values, mask_bias(mask[:, None], keys.dtype))

    def __call__(self, query: Array, memory: Memory, keep: Array) -> tuple[Array, Array]:
        """query (B, query_dim) -> the context (B, A), and the attention weights (B, N, S).

        `keep` broadcasts to the weights and multiplies them: dropout that was drawn beforehand.
        """
        B = query.shape[0]
        q = self.query(query).reshape(B, 1, self.heads, -1)
        energy, score = promote_dtype(
            (jnp.tanh(q + memory.keys), self.score[...]), dtype=self.dtype
        )
        logits = jnp.einsum("bsnd,nd->bns", energy, score) + memory.bias
        weights = jax.nn.softmax(logits, axis=-1)
        kept = weights * keep.astype(weights.dtype)
        context = jnp.einsum("bns,bsnd->bnd", kept, memory.values).reshape(B, -1)
        return self.out(context), weights
