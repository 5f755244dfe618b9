"""Fresh weights. Drawn in NumPy from the seed and the tensor's name, so that one seed gives the
same model in both frameworks, and one tensor's values do not depend on which others are drawn."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable

import numpy as np

from zoo.layout import Layout
from zoo.layout.ops import Shape
from zoo.model import Config, Model


def initial(model: Model, config: Config, names: Iterable[str], seed: int) -> dict[str, np.ndarray]:
    """Float32 values for these canonical tensors: by the family's own rule, or by torch's."""
    layout = model.layout_of(config)
    shapes = layout.shapes("torch")
    kinds = {t.name: e.kind for e in layout.entries for t in e.torch}
    values = {}
    for name in names:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        if model.init is not None:
            value = model.init(config, name, shapes[name], rng)
        else:
            value = torch_default(layout, kinds[name], name, shapes[name], rng)
        values[name] = np.asarray(value, np.float32)
    return values


def torch_default(
    layout: Layout, kind: str, name: str, shape: Shape, rng: np.random.Generator
) -> np.ndarray:
    """What torch's own layers start from (`reset_parameters` in torch.nn).

    nn.Linear and nn.ConvNd: weight and bias uniform within 1/sqrt(fan_in); recurrent layers within
    1/sqrt(hidden); embeddings standard normal; norms and running variances one, the rest zero.
    """
    module, _, leaf = name.rpartition(".")
    if kind == "embedding":
        return rng.standard_normal(shape)
    if kind in ("norm", "batchnorm"):
        return np.ones(shape) if leaf in ("weight", "running_var") else np.zeros(shape)
    shapes = layout.shapes("torch")
    if kind == "recurrent":
        prefix = f"{module}." if module else ""
        hidden = leaf.replace("bias", "weight").replace("_ih", "_hh")
        bound = 1 / math.sqrt(shapes[prefix + hidden][1])
        return rng.uniform(-bound, bound, shape)
    weight = name if len(shape) > 1 else f"{name.removesuffix('bias')}weight"
    if weight not in shapes:
        return np.zeros(shape)
    bound = 1 / math.sqrt(math.prod(shapes[weight][1:]))
    return rng.uniform(-bound, bound, shape)
