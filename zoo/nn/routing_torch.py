"""Routing tokens to experts: what the router adds to training (Fedus 2021, Zoph 2022).

B sequences, T tokens in each, X experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Jitter(nn.Module):
    """In training, multiplies by random numbers, uniform in [1 - noise, 1 + noise)."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.noise == 0:
            return x
        return x * torch.empty_like(x).uniform_(1 - self.noise, 1 + self.noise)


def router_losses(routed: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, T, X) of every sparse layer -> z-loss and load-balancing loss over all layers.

    The first is the mean square of log(sum(exp(logits))) (Zoph 2022, equation 5). The second is X
    times the sum over experts of f * P, where f is the share of tokens that chose the expert and P
    its mean probability (Fedus 2021, equations 4 to 6). Both are 0, in the dtype of `like`, where
    nothing is routed.
    """
    if not routed:
        return like.new_zeros(()), like.new_zeros(())
    logits = torch.cat(routed, 1)
    z_loss = torch.logsumexp(logits, -1).square().mean()
    X = logits.shape[-1]
    share = F.one_hot(logits.argmax(-1), X).to(logits.dtype).mean(1)
    probability = torch.softmax(logits, -1).mean(1)
    return z_loss, X * (share * probability).sum(-1).mean()
