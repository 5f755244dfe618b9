"""The Transformer: an encoder and a decoder of attention alone (Vaswani 2017)."""

from __future__ import annotations

import numpy as np

from zoo import probe
from zoo.model import Model
from zoo.models.transformer.config import PRESETS, TINY, Config
from zoo.models.transformer.layout import UNKNOWN, infer, init, layout


def inputs(c: Config) -> dict[str, np.ndarray]:
    """Two pairs of sequences; the second source and the second target end in padding."""
    B, S, T = 2, 9, 7
    src_padding = np.zeros((B, S), bool)
    tgt_padding = np.zeros((B, T), bool)
    src_padding[1, 6:] = tgt_padding[1, 5:] = True
    return {
        "src": probe.integers("src", (B, S), c.src_vocab_size),
        "tgt": probe.integers("tgt", (B, T), c.tgt_vocab_size),
        "src_key_padding_mask": src_padding,
        "tgt_key_padding_mask": tgt_padding,
    }


MODEL = Model(
    name="transformer",
    version=1,
    summary="encoder and decoder of attention alone (Vaswani 2017)",
    config=Config,
    presets=PRESETS,
    tiny=TINY,
    layout=layout,
    infer=infer,
    inputs=inputs,
    torch="zoo.models.transformer.model_torch:Transformer",
    flax="zoo.models.transformer.model_flax:Transformer",
    init=init,
    unknown=UNKNOWN,
)
