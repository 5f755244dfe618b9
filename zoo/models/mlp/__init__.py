"""Multilayer perceptrons: linear layers with an activation after each."""

from __future__ import annotations

import numpy as np

from zoo import probe
from zoo.model import Model
from zoo.models.mlp.config import PRESETS, TINY, Config
from zoo.models.mlp.layout import infer, layout


def inputs(c: Config) -> dict[str, np.ndarray]:
    """Four samples."""
    return {"x": probe.normal("x", (4, c.sizes[0]))}


MODEL = Model(
    name="mlp",
    version=1,
    summary="multilayer perceptrons",
    config=Config,
    presets=PRESETS,
    tiny=TINY,
    layout=layout,
    infer=infer,
    inputs=inputs,
    torch="zoo.models.mlp.model_torch:MLP",
    flax="zoo.models.mlp.model_flax:MLP",
    unknown=frozenset({"activation", "output_activation"}),
)
