"""Every tensor: those of layer 0, where it has any, and those of layer 1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from zoo.layout import Entry, linear, param
from zoo.layout.ops import Shape
from zoo.model import dim
from zoo.models.custom_layer.config import Config


def layout(c: Config) -> Iterator[Entry]:
    """All entries, in the order of the state_dict."""
    if c.layer == "scale":
        yield param("0.factor", c.in_features)
    yield from linear("1", c.in_features, c.out_features)


def infer(shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
    """The Config fields that names and shapes tell; None where there are tensors of other names."""
    names = set(shapes)
    if not names & {"1.weight", "1.bias"} or names - {"0.factor", "1.weight", "1.bias"}:
        return None
    fields = {
        "layer": "scale" if "0.factor" in names else "identity",
        "in_features": dim(shapes, r"^1\.weight$", 1) or dim(shapes, r"^0\.factor$", 0),
        "out_features": dim(shapes, r"^1\.(weight|bias)$", 0),
    }
    return {name: value for name, value in fields.items() if value is not None}


def init(c: Config, name: str, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """Factors one; the linear layer as nn.Linear starts."""
    if name == "0.factor":
        return np.ones(shape)
    bound = c.in_features**-0.5
    return rng.uniform(-bound, bound, shape)
