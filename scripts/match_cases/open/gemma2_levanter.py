"""Gemma 2 as Levanter keeps it. Source: stanford-crfm/levanter, models/gemma.py and layers/attention.py (looked up)."""

import numpy as np

from _common_a import in_order, state

MANNER = "levanter"
ARCHITECTURE = "gemma2"
NOTES = "stacked on axis 0, out_first; q_proj (layers, kv_heads, q_heads_per_group, head_size, embed); four norms; no lm_head (tied); heads * head_dim != hidden"
LAYERS, HEADS, KV, HD = 3, 8, 4, 12
TIES = {"lm_head.weight": "model.embed_tokens.weight"}
LEFT = ()
EXTRA = ()


def torch_side():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return state(
        Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=83,
                hidden_size=64,
                intermediate_size=112,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                num_key_value_heads=KV,
                head_dim=HD,
            )
        ),
        TIES,
    )


def flax_side(t):
    d = t["model.norm.weight"].shape[0]

    def block(name, *shape):
        w = np.stack([t[f"model.layers.{i}.{name}.weight"] for i in range(LAYERS)])
        return w.reshape(LAYERS, *shape) if shape else w

    y = "transformer.layers.stacked."
    out = {
        y + "self_attn.q_proj.weight": block("self_attn.q_proj", KV, HEADS // KV, HD, d),
        y + "self_attn.k_proj.weight": block("self_attn.k_proj", KV, HD, d),
        y + "self_attn.v_proj.weight": block("self_attn.v_proj", KV, HD, d),
        y + "self_attn.o_proj.weight": block("self_attn.o_proj", d, HEADS, HD),
    }
    for p in ("gate_proj", "up_proj", "down_proj"):
        out[f"{y}mlp.{p}.weight"] = block(f"mlp.{p}")
    for p in (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ):
        out[f"{y}{p}.weight"] = block(p)
    out["transformer.norm.weight"] = t["model.norm.weight"]
    out["embeddings.token_embeddings.weight"] = t["model.embed_tokens.weight"]
    return in_order(out)
