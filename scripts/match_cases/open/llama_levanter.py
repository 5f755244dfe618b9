"""Llama as Levanter keeps it. Source: stanford-crfm/levanter, models/llama.py and layers/attention.py (looked up)."""

import numpy as np

from _common_a import in_order, state

MANNER = "levanter"
ARCHITECTURE = "llama"
NOTES = "stacked on axis 0, out_first; q_proj (layers, kv_heads, q_heads_per_group, head_size, embed); o_proj (layers, embed, heads, head_size); order of fields"
LAYERS, HEADS, KV, HD = 4, 6, 2, 12
TIES = {}
LEFT = ()
EXTRA = ()


def torch_side():
    from transformers import LlamaConfig, LlamaForCausalLM

    return state(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=89,
                hidden_size=72,
                intermediate_size=112,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                num_key_value_heads=KV,
            )
        )
    )


def flax_side(t):
    d = t["model.norm.weight"].shape[0]

    def block(name, *shape):
        w = np.stack([t[f"model.layers.{i}.{name}.weight"] for i in range(LAYERS)])
        return w.reshape(LAYERS, *shape) if shape else w

    y = "transformer.layers.stacked."
    return in_order(
        {
            y + "self_attn.q_proj.weight": block("self_attn.q_proj", KV, HEADS // KV, HD, d),
            y + "self_attn.k_proj.weight": block("self_attn.k_proj", KV, HD, d),
            y + "self_attn.v_proj.weight": block("self_attn.v_proj", KV, HD, d),
            y + "self_attn.o_proj.weight": block("self_attn.o_proj", d, HEADS, HD),
            y + "mlp.gate_proj.weight": block("mlp.gate_proj"),
            y + "mlp.up_proj.weight": block("mlp.up_proj"),
            y + "mlp.down_proj.weight": block("mlp.down_proj"),
            y + "input_layernorm.weight": block("input_layernorm"),
            y + "post_attention_layernorm.weight": block("post_attention_layernorm"),
            "transformer.norm.weight": t["model.norm.weight"],
            "embeddings.token_embeddings.weight": t["model.embed_tokens.weight"],
            "lm_head.weight": t["lm_head.weight"],
        }
    )
