"""Values that make every mistake visible: weights drawn from the tensor's own name.

Under default initialisation all biases are zero and all norms one, so swapping two of them shows
nowhere. Here every tensor differs from every other, at a scale that keeps activations near one.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np

Shape = tuple[int, ...]


def weight(name: str, shape: Shape) -> np.ndarray:
    """The float32 values of the canonical tensor `name`, a formula of its name and shape alone."""
    x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    leaf = name.rpartition(".")[2]
    if leaf == "running_var":
        x = np.exp(0.2 * x)
    elif leaf == "running_mean":
        x = 0.1 * x
    elif len(shape) >= 2:
        x = x / np.sqrt(np.prod(shape[1:]))
    elif len(shape) == 1 and leaf in ("weight", "scale", "gamma"):
        x = 1 + 0.1 * x
    else:
        x = 0.1 * x
    return np.asarray(x, np.float32)


def weights(shapes: Mapping[str, Shape]) -> dict[str, np.ndarray]:
    """`weight` for every tensor."""
    return {name: weight(name, shape) for name, shape in shapes.items()}


def normal(name: str, shape: Shape) -> np.ndarray:
    """A float64 sample input: standard normal values seeded by `name`."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)


def integers(name: str, shape: Shape, high: int) -> np.ndarray:
    """An int64 sample input in [0, high), seeded by `name`."""
    return np.random.RandomState(zlib.crc32(name.encode())).randint(0, high, shape, np.int64)
