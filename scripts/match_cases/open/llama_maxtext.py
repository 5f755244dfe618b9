"""Llama 3.1 as MaxText keeps it, scanned. Source: AI-Hypercomputer/maxtext, checkpoint_conversion/utils/param_mapping.py, LLAMA31 (looked up)."""

import numpy as np

from _common_a import heads_in, heads_out, pair_rope, state, tree

MANNER = "maxtext"
ARCHITECTURE = "llama"
NOTES = "scan axis 1, norms (embed, layers); rotary of neighbouring pairs, so head_dim of query and key is reordered; the folded 1/sqrt(head_dim) of its converter is left out (no scaling here)"
LAYERS, HEADS, KV = 3, 6, 2
TIES = {}
LEFT = ()
EXTRA = ()


def torch_side():
    from transformers import LlamaConfig, LlamaForCausalLM

    return state(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=109,
                hidden_size=48,
                intermediate_size=80,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                num_key_value_heads=KV,
            )
        )
    )


def flax_side(t):
    def scan(name, move=lambda w: w):
        return np.stack([move(t[f"model.layers.{i}.{name}.weight"]) for i in range(LAYERS)], axis=1)

    y = "params.decoder.layers."
    return tree(
        {
            "params.token_embedder.embedding": t["model.embed_tokens.weight"],
            "params.decoder.decoder_norm.scale": t["model.norm.weight"],
            "params.decoder.logits_dense.kernel": t["lm_head.weight"].T,
            y + "pre_self_attention_layer_norm.scale": scan("input_layernorm"),
            y + "post_self_attention_layer_norm.scale": scan("post_attention_layernorm"),
            y + "self_attention.query.kernel": scan(
                "self_attn.q_proj", lambda w: heads_in(pair_rope(w, HEADS), HEADS)
            ),
            y + "self_attention.key.kernel": scan(
                "self_attn.k_proj", lambda w: heads_in(pair_rope(w, KV), KV)
            ),
            y + "self_attention.value.kernel": scan("self_attn.v_proj", lambda w: heads_in(w, KV)),
            y + "self_attention.out.kernel": scan(
                "self_attn.o_proj", lambda w: heads_out(w, HEADS)
            ),
            y + "mlp.wi_0.kernel": scan("mlp.gate_proj", np.transpose),
            y + "mlp.wi_1.kernel": scan("mlp.up_proj", np.transpose),
            y + "mlp.wo.kernel": scan("mlp.down_proj", np.transpose),
        }
    )
