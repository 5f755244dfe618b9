"""WaveNet: raw audio, sample by sample, by causal dilated convolutions (van den Oord 2016)."""

from __future__ import annotations

import numpy as np

from zoo import probe
from zoo.model import Model
from zoo.models.wavenet.config import PRESETS, TINY, Config
from zoo.models.wavenet.layout import infer, layout


def inputs(c: Config) -> dict[str, np.ndarray]:
    """Two sequences, longer than the receptive field of a tiny config, with their conditions."""
    B, T = 2, 24
    given = {"samples": probe.integers("samples", (B, T), c.classes)}
    if c.global_channels:
        given["global_condition"] = probe.normal("global_condition", (B, c.global_channels))
    if c.local_channels:
        given["local_condition"] = probe.normal("local_condition", (B, T, c.local_channels))
    return given


MODEL = Model(
    name="wavenet",
    version=1,
    summary="raw audio by causal dilated convolutions (van den Oord 2016)",
    config=Config,
    presets=PRESETS,
    tiny=TINY,
    layout=layout,
    infer=infer,
    inputs=inputs,
    torch="zoo.models.wavenet.model_torch:WaveNet",
    flax="zoo.models.wavenet.model_flax:WaveNet",
    images=("input", "layers.*", "output1", "output2"),  # but not the logits (B, T, classes)
    invisible=(
        (
            r"^layers\.\d+\.skip\.bias$",
            "the skip connections are only added up: layers may trade their biases",
        ),
    ),
    unknown=frozenset({"dilation_cycle"}),
)
