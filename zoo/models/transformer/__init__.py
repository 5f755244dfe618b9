"""The Transformer: an encoder and a decoder of attention alone (Vaswani 2017)."""

from __future__ import annotations

import numpy as np

from zoo import probe
from zoo.model import Model
from zoo.models.transformer.config import PRESETS, TINY, Config
from zoo.models.transformer.layout import UNKNOWN, infer, init, layout


def inputs(c: Config) -> dict[str, np.ndarray]:
    """Two pairs of sequences; the second source and the second target end in padding. Of vectors,
    where there are no words, with a causal mask."""
    B, S, T = 2, 9, 7
    src_padding = np.zeros((B, S), bool)
    tgt_padding = np.zeros((B, T), bool)
    src_padding[1, 6:] = tgt_padding[1, 5:] = True
    masks = {"src_key_padding_mask": src_padding, "tgt_key_padding_mask": tgt_padding}
    if c.bare:
        vectors = {
            "src": probe.normal("src", (B, S, c.d_model)),
            "tgt": probe.normal("tgt", (B, T, c.d_model)),
        }
        return vectors | masks | {"tgt_mask": np.triu(np.ones((T, T), bool), 1)}
    words = {
        "src": probe.integers("src", (B, S), c.src_vocab_size),
        "tgt": probe.integers("tgt", (B, T), c.tgt_vocab_size),
    }
    return words | masks


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
    torch="zoo.models.transformer.model_torch:transformer",
    flax="zoo.models.transformer.model_flax:transformer",
    init=init,
    unknown=UNKNOWN,
)
