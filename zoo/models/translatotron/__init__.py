"""Translatotron: speech in one language to speech in another, by spectrograms (Jia 2019)."""

from __future__ import annotations

import numpy as np

from zoo import probe
from zoo.model import Model
from zoo.models.translatotron.config import PRESETS, TINY, Config
from zoo.models.translatotron.layout import UNKNOWN, infer, layout


def inputs(c: Config) -> dict[str, np.ndarray]:
    """Two utterances, the second one shorter, with their target and its phonemes."""
    B, S, T, L = 2, 7, 3 * c.reduction, 4
    given = {
        "source": probe.normal("source", (B, S, c.mel_channels)),
        "target": probe.normal("target", (B, T, c.frame_size)),
        "source_lengths": np.array([S, S - 2], np.int64),
    }
    if c.source_phonemes:
        given["source_phonemes"] = probe.integers("source_phonemes", (B, L), c.source_phonemes)
    if c.target_phonemes:
        given["target_phonemes"] = probe.integers("target_phonemes", (B, L), c.target_phonemes)
    return given


MODEL = Model(
    name="translatotron",
    version=1,
    summary="speech-to-speech translation by spectrograms (Jia 2019)",
    config=Config,
    presets=PRESETS,
    tiny=TINY,
    layout=layout,
    infer=infer,
    inputs=inputs,
    torch="zoo.models.translatotron.model_torch:Translatotron",
    flax="zoo.models.translatotron.model_flax:Translatotron",
    images=("postnet.*",),  # not `postnet` itself, which gives (B, T, F) in both
    invisible=(
        (
            r"\.bias_(ih|hh)(_l0(_reverse)?)?$",
            "the two biases of an LSTM are only added up: they may trade places",
        ),
    ),
    unknown=UNKNOWN,
    placeholders={"source_layer": 1, "target_layer": 1},
)
