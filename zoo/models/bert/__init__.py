"""BERT: a bidirectional Transformer encoder (Devlin 2018), with its usual heads."""

from __future__ import annotations

import numpy as np

from zoo import probe
from zoo.model import Model
from zoo.models.bert.config import HEADS, PRESETS, TINY, Config, from_hf, to_hf
from zoo.models.bert.layout import PREFIX, SPELLINGS, infer, init, layout
from zoo.models.bert.others import others


def inputs(c: Config) -> dict[str, np.ndarray]:
    """Two sequences, or one text with two choices, the second padded, with two token types."""
    T = min(11, c.max_position_embeddings)
    shape = (1, 2, T) if c.head == "multiple_choice" else (2, T)
    mask = np.ones((2, T), np.int64)
    mask[1, T * 2 // 3 :] = 0
    return {
        "input_ids": probe.integers("input_ids", shape, c.vocab_size),
        "attention_mask": mask.reshape(shape),
        "token_type_ids": probe.integers("token_type_ids", shape, c.type_vocab_size),
    }


MODEL = Model(
    name="bert",
    version=1,
    summary="bidirectional Transformer encoder (Devlin 2018)",
    config=Config,
    presets=PRESETS,
    tiny=TINY,
    layout=layout,
    infer=infer,
    inputs=inputs,
    torch="zoo.models.bert.model_torch:bert",
    flax="zoo.models.bert.model_flax:bert",
    init=init,
    invisible=(
        (
            r"attention\.self\.key\.bias$",
            "it adds the same number to all logits of a query, which the softmax takes out",
        ),
    ),
    unknown=frozenset(
        {"num_attention_heads", "hidden_act", "layer_norm_eps", "head"}
        | {"tie_word_embeddings", "tie_decoder_bias"}
    ),
    placeholders={"num_attention_heads": 1, "head": "sequence_classification"},
    structure=frozenset(
        {"head", "pooler", "num_labels", "tie_word_embeddings", "tie_decoder_bias"}
    ),
    spellings=SPELLINGS,
    called={"transformers": "torch", "transformers-flax": "nnx"},
    base_prefix=PREFIX,
    hf_type="bert",
    from_hf=from_hf,
    to_hf=to_hf,
    hf_classes=frozenset(of.hf for of in HEADS.values()),
    others=others,
    untied={
        "cls.predictions.decoder.weight": "tie_word_embeddings",
        "cls.predictions.decoder.bias": "tie_decoder_bias",
    },
)
