"""The Switch Transformer: T5 with experts, of which each token visits one (Fedus 2021)."""

from __future__ import annotations

import numpy as np

from zoo import probe
from zoo.model import Model
from zoo.models.switch_transformer.config import PRESETS, TINY, Config, from_hf, to_hf
from zoo.models.switch_transformer.layout import UNKNOWN, infer, init, layout


def inputs(c: Config) -> dict[str, np.ndarray]:
    """Two pairs of sequences; the second source and the second target end in padding."""
    B, S, T = 2, 16, 14
    mask = np.ones((B, S), np.int64)
    decoder_mask = np.ones((B, T), np.int64)
    mask[1, 13:] = decoder_mask[1, 11:] = 0
    return {
        "input_ids": probe.integers("input_ids", (B, S), c.vocab_size),
        "attention_mask": mask,
        "decoder_input_ids": probe.integers("decoder_input_ids", (B, T), c.vocab_size),
        "decoder_attention_mask": decoder_mask,
    }


MODEL = Model(
    name="switch_transformer",
    version=1,
    summary="T5 with experts, of which each token visits one (Fedus 2021)",
    config=Config,
    presets=PRESETS,
    tiny=TINY,
    layout=layout,
    infer=infer,
    inputs=inputs,
    torch="zoo.models.switch_transformer.model_torch:SwitchTransformer",
    flax="zoo.models.switch_transformer.model_flax:SwitchTransformer",
    init=init,
    unknown=UNKNOWN,
    hf_type="switch_transformers",
    from_hf=from_hf,
    to_hf=to_hf,
)
