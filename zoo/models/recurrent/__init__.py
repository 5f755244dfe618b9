"""Recurrent nets with linear layers on top: one answer for a sequence, or one for every step."""

from __future__ import annotations

import numpy as np

from zoo import probe
from zoo.model import Model
from zoo.models.recurrent.config import PRESETS, TINY, Config
from zoo.models.recurrent.layout import UNKNOWN, infer, layout


def inputs(c: Config) -> dict[str, np.ndarray]:
    """Three sequences of five steps; token ids come with lengths, the others are all whole."""
    B, T = 3, 5
    steps = (B, T) if c.batch_first else (T, B)
    if c.vocab_size is None:
        return {"x": probe.normal("x", (*steps, c.input_size))}
    return {"x": probe.integers("x", steps, c.vocab_size), "lengths": np.array([3, 5, 2])}


MODEL = Model(
    name="recurrent",
    version=1,
    summary="RNN, LSTM or GRU with linear layers on its last state or on every step",
    config=Config,
    presets=PRESETS,
    tiny=TINY,
    layout=layout,
    infer=infer,
    inputs=inputs,
    torch="zoo.models.recurrent.model_torch:build",
    flax="zoo.models.recurrent.model_flax:build",
    invisible=(
        (
            r"^(rnn|lstm)\.bias_(ih|hh)_l",
            "an RNN and an LSTM add the two up, so no output shows which is which",
        ),
    ),
    unknown=UNKNOWN,
)
