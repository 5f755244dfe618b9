"""Routing tokens to experts: what the router adds to training (Fedus 2021, Zoph 2022).

B sequences, T tokens in each, X experts.
"""

from __future__ import annotations

from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from zoo.nn.options_flax import Options


class Jitter(nnx.Module):
    """In training, multiplies by random numbers, uniform in [1 - noise, 1 + noise)."""

    def __init__(self, noise: float, **kw: Unpack[Options]) -> None:
        self.noise = noise
        self.deterministic = False  # set by model.train() and model.eval()
        self.rngs = kw["rngs"].dropout.fork()

    def __call__(self, x: Array) -> Array:
        if self.deterministic or self.noise == 0:
            return x
        low, high = 1 - self.noise, 1 + self.noise
        return x * jax.random.uniform(self.rngs(), x.shape, x.dtype, low, high)


def router_losses(routed: list[Array], like: Array) -> tuple[Array, Array]:
    """Logits (B, T, X) of every sparse layer -> z-loss and load-balancing loss over all layers.

    The first is the mean square of log(sum(exp(logits))) (Zoph 2022, equation 5). The second is X
    times the sum over experts of f * P, where f is the share of tokens that chose the expert and P
    its mean probability (Fedus 2021, equations 4 to 6). Both are 0, in the dtype of `like`, where
    nothing is routed.
    """
    if not routed:
        return jnp.zeros((), like.dtype), jnp.zeros((), like.dtype)
    logits = jnp.concatenate(routed, 1)
    z_loss = jnp.square(jax.nn.logsumexp(logits, -1)).mean()
    X = logits.shape[-1]
    share = jax.nn.one_hot(logits.argmax(-1), X, dtype=logits.dtype).mean(1)
    probability = jax.nn.softmax(logits, -1).mean(1)
    return z_loss, X * (share * probability).sum(-1).mean()
