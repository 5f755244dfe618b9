"""Linear maps: a straight line with two numbers, and a bare linear layer."""

from __future__ import annotations

import numpy as np

from zoo import probe
from zoo.model import Model
from zoo.models.linear.config import PRESETS, TINY, Config
from zoo.models.linear.layout import infer, init, layout


def inputs(c: Config) -> dict[str, np.ndarray]:
    """Four samples."""
    return {"x": probe.normal("x", (4, c.in_features))}


MODEL = Model(
    name="linear",
    version=1,
    summary="one linear map: linear regression, a bare linear layer",
    config=Config,
    presets=PRESETS,
    tiny=TINY,
    layout=layout,
    infer=infer,
    inputs=inputs,
    torch="zoo.models.linear.model_torch:linear",
    flax="zoo.models.linear.model_flax:linear",
    init=init,
)
