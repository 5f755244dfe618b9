"""Small convolutional classifiers: convolutions with ReLU and pools, then linear layers."""

from __future__ import annotations

import numpy as np

from zoo import probe
from zoo.model import Model
from zoo.models.convnet.config import PRESETS, TINY, Config
from zoo.models.convnet.layout import infer, layout


def inputs(c: Config) -> dict[str, np.ndarray]:
    """Two images, NCHW."""
    return {"x": probe.normal("x", (2, c.in_channels, c.image_size, c.image_size))}


MODEL = Model(
    name="convnet",
    version=1,
    summary="small convolutional classifiers (LeCun 1998 and its heirs)",
    config=Config,
    presets=PRESETS,
    tiny=TINY,
    layout=layout,
    infer=infer,
    inputs=inputs,
    torch="zoo.models.convnet.model_torch:ConvNet",
    flax="zoo.models.convnet.model_flax:ConvNet",
    images=("x", "conv*"),
    unknown=frozenset({"image_size", "stride", "padding", "pool"}),
)
