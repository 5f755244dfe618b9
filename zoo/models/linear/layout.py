"""Every tensor of a linear map; the names are those of the root, with no module before them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from zoo.layout import Entry, linear, param
from zoo.layout.ops import Shape
from zoo.model import dim
from zoo.models.linear.config import Config


def layout(c: Config) -> Iterator[Entry]:
    """All entries, in the order of the state_dict."""
    if c.form == "scalar":
        yield param("w", 1)
        yield param("b", 1)
    else:
        yield from linear("", c.in_features, c.out_features)


def infer(shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
    """The Config fields that names and shapes tell; None where there are tensors of other names."""
    names = set(shapes)
    if not names:
        return None
    if names <= {"w", "b"}:
        return {"form": "scalar", "in_features": 1, "out_features": 1}
    if names <= {"weight", "bias"} and len(shapes.get("weight", ())) == 2:
        return {
            "form": "matrix",
            "in_features": dim(shapes, "^weight$", 1),
            "out_features": dim(shapes, "^(weight|bias)$", 0),
        }
    return None


def init(c: Config, name: str, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """`w` and `b` standard normal; weight and bias as nn.Linear has them."""
    if c.form == "scalar":
        return rng.standard_normal(shape)
    bound = c.in_features**-0.5
    return rng.uniform(-bound, bound, shape)
