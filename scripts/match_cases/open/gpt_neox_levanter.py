"""GPT-NeoX in Levanter's manner. Source: stanford-crfm/levanter, models/gpt2.py, haliax Linear (looked up; it has no NeoX)."""

import numpy as np

from _common_a import in_order, state

MANNER = "levanter"
ARCHITECTURE = "gpt_neox"
NOTES = "stacked on axis 0, out_first; query_key_value (layers, heads, qkv, head_size, embed) with bias (layers, heads, qkv, head_size); dense (layers, embed, heads, head_size)"
VOCAB, LAYERS, HEADS, HD = 83, 4, 6, 8
TIES = {}
LEFT = ()
EXTRA = ()


def torch_side():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return state(
        GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=VOCAB,
                hidden_size=HEADS * HD,
                intermediate_size=4 * HEADS * HD,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    )


def flax_side(t):
    d = HEADS * HD

    def block(name, *shape):
        w = np.stack([t[f"gpt_neox.layers.{i}.{name}"] for i in range(LAYERS)])
        return w.reshape(LAYERS, *shape) if shape else w

    y = "transformer.layers.stacked."
    out = {}
    for p in ("input_layernorm", "post_attention_layernorm"):
        for leaf in ("weight", "bias"):
            out[f"{y}{p}.{leaf}"] = block(f"{p}.{leaf}")
    out[y + "attention.query_key_value.weight"] = block(
        "attention.query_key_value.weight", HEADS, 3, HD, d
    )
    out[y + "attention.query_key_value.bias"] = block(
        "attention.query_key_value.bias", HEADS, 3, HD
    )
    out[y + "attention.dense.weight"] = block("attention.dense.weight", d, HEADS, HD)
    out[y + "attention.dense.bias"] = block("attention.dense.bias")
    for p in ("dense_h_to_4h", "dense_4h_to_h"):
        for leaf in ("weight", "bias"):
            out[f"{y}mlp.{p}.{leaf}"] = block(f"mlp.{p}.{leaf}")
    out["transformer.final_layer_norm.weight"] = t["gpt_neox.final_layer_norm.weight"]
    out["transformer.final_layer_norm.bias"] = t["gpt_neox.final_layer_norm.bias"]
    out["embeddings.token_embeddings.weight"] = t["gpt_neox.embed_in.weight"]
    out["lm_head.weight"] = t["lm_head.weight"]
    return in_order(out)
