"""A linear layer behind a layer of one's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LAYERS = ("identity", "scale")


@dataclass(frozen=True)
class Config:
    """Defaults are those of custom_layer."""

    layer: Literal["identity", "scale"] = "identity"  # one without parameters, one with
    in_features: int = 10
    out_features: int = 10

    def __post_init__(self) -> None:
        if self.layer not in LAYERS:
            raise ValueError(f"layer {self.layer!r} is none of {', '.join(LAYERS)}")


PRESETS = {"custom_layer": Config()}

TINY = {
    "identity": Config(in_features=5, out_features=8),
    "scale": Config("scale", in_features=5, out_features=8),
}
