"""AlexNet: five convolutions and three linear layers (Krizhevsky 2012, in one tower)."""

from __future__ import annotations

import numpy as np

from zoo import probe
from zoo.model import Model
from zoo.models.alexnet.config import PRESETS, TINY, Config
from zoo.models.alexnet.layout import infer, layout


def inputs(c: Config) -> dict[str, np.ndarray]:
    """Two images, NCHW; smaller than ImageNet's, so that the adaptive pool has something to do."""
    return {"x": probe.normal("x", (2, 3, 128, 128))}


MODEL = Model(
    name="alexnet",
    version=1,
    summary="five convolutions, three linear layers (Krizhevsky 2012, 2014)",
    config=Config,
    presets=PRESETS,
    tiny=TINY,
    layout=layout,
    infer=infer,
    inputs=inputs,
    torch="zoo.models.alexnet.model_torch:AlexNet",
    flax="zoo.models.alexnet.model_flax:AlexNet",
    images=("x", "features*", "avgpool"),
)
