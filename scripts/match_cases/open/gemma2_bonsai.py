"""Gemma 2 in Bonsai's manner. Source: jax-ml/bonsai, models/gemma3/modeling.py, text part (looked up; carried over to Gemma 2)."""

import numpy as np

from _common_a import state, tree

MANNER = "bonsai"
ARCHITECTURE = "gemma2"
NOTES = "NNX lists under language_model; plain Linear kernels (in, out); the embedding sits at embed_tokens.weight.embedding beside an embed_scale that is a constant (EXTRA)"
LAYERS, HEADS, KV, HD = 2, 6, 3, 8
TIES = {"lm_head.weight": "model.embed_tokens.weight"}
LEFT = ()
EXTRA = ("embed_tokens.embed_scale",)


def torch_side():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return state(
        Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=107,
                hidden_size=48,
                intermediate_size=72,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                num_key_value_heads=KV,
                head_dim=HD,
            )
        ),
        TIES,
    )


def flax_side(t):
    embed = t["model.embed_tokens.weight"]
    out = {
        "embed_tokens.weight.embedding": embed,
        "embed_tokens.embed_scale": np.array(embed.shape[1] ** 0.5, np.float32),
        "language_model.norm.scale": t["model.norm.weight"],
    }
    for name, w in t.items():
        if name.startswith("model.layers."):
            base = name.removeprefix("model.").removesuffix(".weight")
            out[f"language_model.{base}.{'kernel' if w.ndim == 2 else 'scale'}"] = w.T
    return tree(out)
