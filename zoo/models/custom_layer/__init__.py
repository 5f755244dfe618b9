"""A linear layer behind a layer of one's own, with parameters and without."""

from __future__ import annotations

import numpy as np

from zoo import probe
from zoo.model import Model
from zoo.models.custom_layer.config import PRESETS, TINY, Config
from zoo.models.custom_layer.layout import infer, init, layout


def inputs(c: Config) -> dict[str, np.ndarray]:
    """Four samples."""
    return {"x": probe.normal("x", (4, c.in_features))}


MODEL = Model(
    name="custom_layer",
    version=1,
    summary="a linear layer behind a layer of one's own",
    config=Config,
    presets=PRESETS,
    tiny=TINY,
    layout=layout,
    infer=infer,
    inputs=inputs,
    torch="zoo.models.custom_layer.model_torch:Sequential",
    flax="zoo.models.custom_layer.model_flax:Sequential",
    init=init,
)
