"""ResNet: deep residual networks (He 2015), with the strides of v1.5."""

from __future__ import annotations

import numpy as np

from zoo import probe
from zoo.model import Model
from zoo.models.resnet.config import PRESETS, TINY, Config
from zoo.models.resnet.dialects import DIALECTS, from_hf, to_hf
from zoo.models.resnet.layout import infer, init, layout


def inputs(c: Config) -> dict[str, np.ndarray]:
    """Two small images, NCHW."""
    side = 64 if c.stem_pool else 16
    return {"x": probe.normal("x", (2, c.in_channels, side, side))}


MODEL = Model(
    name="resnet",
    version=1,
    summary="deep residual networks, v1.5 (He 2015)",
    config=Config,
    presets=PRESETS,
    tiny=TINY,
    layout=layout,
    infer=infer,
    inputs=inputs,
    torch="zoo.models.resnet.model_torch:ResNet",
    flax="zoo.models.resnet.model_flax:ResNet",
    init=init,
    unknown=frozenset({"stem_stride", "stem_pool"}),
    dialects=DIALECTS,
    called={"torchvision": "torch", "timm": "torch"},
    hf_type="resnet",
    from_hf=from_hf,
    to_hf=to_hf,
    hf_classes=frozenset({"ResNetForImageClassification", "ResNetModel"}),
    images=("x", "conv1", "bn1", "maxpool", "layer*", "avgpool"),
)
