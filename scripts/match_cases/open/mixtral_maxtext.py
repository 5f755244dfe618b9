"""Mixtral as MaxText keeps it, scanned. Source: AI-Hypercomputer/maxtext, param_mapping.py, MIXTRAL, layers/moe.py (looked up)."""

import numpy as np

from _common_a import heads_in, heads_out, saved, tree

MANNER = "maxtext"
ARCHITECTURE = "mixtral"
NOTES = "torch side is the published spelling that save_pretrained writes (one tensor per expert); wi_0/wi_1/wo are bare leaves (experts, layers, in, out); the converter's query scaling is left out"
VOCAB, FF, LAYERS, HEADS, KV, HD, EXPERTS = 97, 56, 3, 4, 2, 10, 4
TIES = {}
LEFT = ()
EXTRA = ()


def torch_side():
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB,
            hidden_size=HEADS * HD,
            intermediate_size=FF,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV,
            num_local_experts=EXPERTS,
        )
    )
    return saved(model)


def flax_side(t):
    def scan(name, move=lambda w: w):
        return np.stack([move(t[f"model.layers.{i}.{name}.weight"]) for i in range(LAYERS)], axis=1)

    def experts(w):
        return np.stack(
            [
                scan(f"block_sparse_moe.experts.{e}.{w}", np.transpose).swapaxes(0, 1)
                for e in range(EXPERTS)
            ]
        )

    y = "params.decoder.layers."
    return tree(
        {
            "params.token_embedder.embedding": t["model.embed_tokens.weight"],
            "params.decoder.decoder_norm.scale": t["model.norm.weight"],
            "params.decoder.logits_dense.kernel": t["lm_head.weight"].T,
            y + "pre_self_attention_layer_norm.scale": scan("input_layernorm"),
            y + "post_self_attention_layer_norm.scale": scan("post_attention_layernorm"),
            y + "self_attention.query.kernel": scan(
                "self_attn.q_proj", lambda w: heads_in(w, HEADS)
            ),
            y + "self_attention.key.kernel": scan("self_attn.k_proj", lambda w: heads_in(w, KV)),
            y + "self_attention.value.kernel": scan("self_attn.v_proj", lambda w: heads_in(w, KV)),
            y + "self_attention.out.kernel": scan(
                "self_attn.o_proj", lambda w: heads_out(w, HEADS)
            ),
            y + "MoeBlock_0.gate.kernel": scan("block_sparse_moe.gate", np.transpose),
            y + "MoeBlock_0.wi_0": experts("w1"),
            y + "MoeBlock_0.wi_1": experts("w3"),
            y + "MoeBlock_0.wo": experts("w2"),
        }
    )
