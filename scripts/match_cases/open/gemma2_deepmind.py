"""Gemma 2 in DeepMind's own tree. Source: google-deepmind/gemma, gm/nn/_modules.py and _transformer.py (looked up)."""

import numpy as np

from _common_a import heads_out, state, tree

MANNER = "deepmind"
ARCHITECTURE = "gemma2"
NOTES = "q_einsum.w (heads, embed, head_dim), kv_einsum.w (2, kv_heads, embed, head_dim); gating_einsum.w (2, hidden, embed) as in the 9b (transposed); layer_N names; tied"
LAYERS, HEADS, KV, HD = 3, 8, 4, 12
TIES = {"lm_head.weight": "model.embed_tokens.weight"}
LEFT = ()
EXTRA = ()


def torch_side():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return state(
        Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=101,
                hidden_size=40,
                intermediate_size=88,
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

    def ndh(w, h):
        return w.reshape(h, HD, d).swapaxes(1, 2)

    out = {
        "transformer.embedder.input_embedding": t["model.embed_tokens.weight"],
        "transformer.final_norm.scale": t["model.norm.weight"],
    }
    for i in range(LAYERS):
        x, y = f"model.layers.{i}.", f"transformer.layer_{i}."
        q, k, v, o = (t[f"{x}self_attn.{p}_proj.weight"] for p in "qkvo")
        out[y + "attn.q_einsum.w"] = ndh(q, HEADS)
        out[y + "attn.kv_einsum.w"] = np.stack([ndh(k, KV), ndh(v, KV)])
        out[y + "attn.attn_vec_einsum.w"] = heads_out(o, HEADS)
        out[y + "mlp.gating_einsum.w"] = np.stack(
            [t[x + "mlp.gate_proj.weight"], t[x + "mlp.up_proj.weight"]]
        )
        out[y + "mlp.linear.w"] = t[x + "mlp.down_proj.weight"].T
        for theirs, ours in (
            ("pre_attention_norm", "input_layernorm"),
            ("post_attention_norm", "post_attention_layernorm"),
            ("pre_ffw_norm", "pre_feedforward_layernorm"),
            ("post_ffw_norm", "post_feedforward_layernorm"),
        ):
            out[f"{y}{theirs}.scale"] = t[f"{x}{ours}.weight"]
    return tree(out)
