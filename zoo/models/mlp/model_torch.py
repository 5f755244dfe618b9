"""A multilayer perceptron in PyTorch.

B samples; the widths of the layers are `Config.sizes`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Unpack

import torch
from torch import Tensor, nn

from zoo.models.mlp.config import Config
from zoo.nn.layers_torch import Linear
from zoo.nn.options_torch import Options

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "none": lambda x: x,
}


class MLP(nn.Module):
    """Linear layers named `Config.names`, an activation after each."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.config = c
        for name, (n_in, n_out) in zip(c.names, pairwise(c.sizes), strict=True):
            setattr(self, name, Linear(n_in, n_out, **kw))

    def forward(self, x: Tensor) -> Tensor:
        """(B, sizes[0]) -> (B, sizes[-1])."""
        c = self.config
        for name in c.names[:-1]:
            x = ACTIVATIONS[c.activation](getattr(self, name)(x))
        x = getattr(self, c.names[-1])(x)
        return ACTIVATIONS[c.output_activation](x)
