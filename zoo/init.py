"""Fresh weights. Drawn in NumPy from the seed and the tensor's name, so that one seed gives the
same model in both frameworks, and one tensor's values do not depend on which others are drawn."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np

from zoo.model import Config, Model


def initial(model: Model, config: Config, names: Iterable[str], seed: int) -> dict[str, np.ndarray]:
    """Float32 values for these canonical tensors, by the family's own rule."""
    shapes = model.layout_of(config).shapes("torch")
    return {
        name: np.asarray(model.init(config, name, shapes[name], _generator(seed, name)), np.float32)
        for name in names
    }


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])
