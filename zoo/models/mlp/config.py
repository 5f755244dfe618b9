"""Sizes and activations of a multilayer perceptron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Activation = Literal["relu", "sigmoid", "tanh", "none"]

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


@dataclass(frozen=True)
class Config:
    """Defaults are those of mlp_10_20_10."""

    sizes: tuple[int, ...] = (10, 20, 10)  # of the input, of every hidden layer, of the output
    activation: Activation = "relu"  # after every layer but the last
    output_activation: Activation = "none"  # after the last
    # Layers `fc1`, `fc2`, ..., or `0`, `2`, ... as in an nn.Sequential with activations between.
    naming: Literal["fc", "sequential"] = "fc"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))  # JSON has lists
        if not all(type(n) is int and n > 0 for n in self.sizes):
            raise ValueError(f"{self.sizes} are not all whole numbers above zero")
        if len(self.sizes) < 2:
            raise ValueError(f"sizes {self.sizes}: an input and an output are needed")
        for name in (self.activation, self.output_activation):
            if name not in ACTIVATIONS:
                raise ValueError(f"activation {name!r} is none of {', '.join(ACTIVATIONS)}")
        if self.naming not in ("fc", "sequential"):
            raise ValueError(f"naming {self.naming!r} is neither fc nor sequential")

    @property
    def names(self) -> tuple[str, ...]:
        """The layers, first to last."""
        layers = range(len(self.sizes) - 1)
        return tuple(f"fc{i + 1}" if self.naming == "fc" else str(2 * i) for i in layers)


PRESETS = {
    "mlp_10_20_10": Config(),
    "mlp_10_20_10_1": Config((10, 20, 10, 1)),
    "mlp_2_3_1": Config((2, 3, 1)),
    "binary_mlp": Config((10, 100, 10, 1), "relu", "sigmoid", "sequential"),
    "sigmoid_mlp": Config((10, 100, 10, 1), "sigmoid", "sigmoid"),
    "recommendation": Config((10, 10, 10, 10)),
    "robot": Config((10, 10, 10)),
}

TINY = {
    "relu": Config((5, 16, 16, 3)),
    "sequential": Config((4, 16, 8, 1), "relu", "sigmoid", "sequential"),
    "sigmoid": Config((6, 7, 7, 2), "sigmoid", "sigmoid"),
    "tanh": Config((4, 4), "none", "tanh"),
}
