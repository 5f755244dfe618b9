"""A multilayer perceptron in PyTorch.

B samples; the widths of the layers are `Config.sizes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.models.mlp.config import Config
from zoo.nn.layers_torch import Linear
from zoo.nn.taps import Taps

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "none": lambda x: x,
}


class MLP(nn.Module):
    """`dtype` is that of the computation, `param_dtype` of the weights."""

    def __init__(self, c: Config, **kw: Any) -> None:
        super().__init__()
        self.config = c
        for name, n_in, n_out in zip(c.names, c.sizes[:-1], c.sizes[1:], strict=True):
            setattr(self, name, Linear(n_in, n_out, **kw))

    def forward(self, x: Tensor, taps: bool = False) -> Any:
        """(B, sizes[0]) -> (B, sizes[-1]); `taps=True` adds {layer: what it gives}."""
        c, tap = self.config, Taps(taps)
        for name in c.names:
            activation = c.output_activation if name == c.names[-1] else c.activation
            x = ACTIVATIONS[activation](tap(name, getattr(self, name)(x)))
        return tap.result(x)
