"""GPT-NeoX in plain Linen with nn.scan and automatic names. Source: flax.linen conventions (from memory)."""

import numpy as np

from _common_a import heads_out, state, tree

MANNER = "linen_scan"
ARCHITECTURE = "gpt_neox"
NOTES = "torch's fused qkv is per head (heads, 3, head_dim): query takes every third stretch of rows; leading layer axis; automatic names, two parallel LayerNorms"
VOCAB, LAYERS, HEADS, HD = 101, 3, 6, 8
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

    def block(name, move=lambda w: w):
        return np.stack([move(t[f"gpt_neox.layers.{i}.{name}"]) for i in range(LAYERS)])

    y = "params.ScanParallelBlock_0."
    mha = y + "MultiHeadDotProductAttention_0."
    out = {
        "params.Embed_0.embedding": t["gpt_neox.embed_in.weight"],
        "params.LayerNorm_0.scale": t["gpt_neox.final_layer_norm.weight"],
        "params.LayerNorm_0.bias": t["gpt_neox.final_layer_norm.bias"],
        "params.Dense_0.kernel": t["lm_head.weight"].T,
        mha + "out.kernel": block("attention.dense.weight", lambda w: heads_out(w, HEADS)),
        mha + "out.bias": block("attention.dense.bias"),
    }
    for j, part in enumerate(("query", "key", "value")):
        out[mha + part + ".kernel"] = block(
            "attention.query_key_value.weight",
            lambda w: w.reshape(HEADS, 3, HD, d)[:, j].transpose(2, 0, 1),
        )
        out[mha + part + ".bias"] = block(
            "attention.query_key_value.bias", lambda b: b.reshape(HEADS, 3, HD)[:, j]
        )
    for j, p in enumerate(("input_layernorm", "post_attention_layernorm")):
        out[f"{y}LayerNorm_{j}.scale"] = block(p + ".weight")
        out[f"{y}LayerNorm_{j}.bias"] = block(p + ".bias")
    for j, p in enumerate(("dense_h_to_4h", "dense_4h_to_h")):
        out[f"{y}Dense_{j}.kernel"] = block(f"mlp.{p}.weight", np.transpose)
        out[f"{y}Dense_{j}.bias"] = block(f"mlp.{p}.bias")
    return tree(out)
