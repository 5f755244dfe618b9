"""Qwen3 (tied, as the small ones are) as MaxText keeps it, scanned. Source: AI-Hypercomputer/maxtext, param_mapping.py, QWEN (looked up)."""
import numpy as np

from _common_a import heads_in, heads_out, state, tree

MANNER = "maxtext"
ARCHITECTURE = "qwen3"
NOTES = "scan axis 1; query_norm/key_norm (head_dim, layers); no rotary reorder for this family; logits via embedding"
LAYERS, HEADS, KV, HD = 4, 6, 2, 10
TIES = {"lm_head.weight": "model.embed_tokens.weight"}
LEFT = ()
EXTRA = ()


def torch_side():
    from transformers import Qwen3Config, Qwen3ForCausalLM
    return state(Qwen3ForCausalLM(Qwen3Config(vocab_size=103, hidden_size=40, intermediate_size=72, num_hidden_layers=LAYERS,
                                              num_attention_heads=HEADS, num_key_value_heads=KV, head_dim=HD,
                                              tie_word_embeddings=True)), TIES)


def flax_side(t):
    def scan(name, move=lambda w: w):
        return np.stack([move(t[f"model.layers.{i}.{name}.weight"]) for i in range(LAYERS)], axis=1)

    y = "params.decoder.layers."
    return tree({
        "params.token_embedder.embedding": t["model.embed_tokens.weight"],
        "params.decoder.decoder_norm.scale": t["model.norm.weight"],
        y + "pre_self_attention_layer_norm.scale": scan("input_layernorm"),
        y + "post_self_attention_layer_norm.scale": scan("post_attention_layernorm"),
        y + "self_attention.query.kernel": scan("self_attn.q_proj", lambda w: heads_in(w, HEADS)),
        y + "self_attention.key.kernel": scan("self_attn.k_proj", lambda w: heads_in(w, KV)),
        y + "self_attention.value.kernel": scan("self_attn.v_proj", lambda w: heads_in(w, KV)),
        y + "self_attention.out.kernel": scan("self_attn.o_proj", lambda w: heads_out(w, HEADS)),
        y + "self_attention.query_norm.scale": scan("self_attn.q_norm"),
        y + "self_attention.key_norm.scale": scan("self_attn.k_norm"),
        y + "mlp.wi_0.kernel": scan("mlp.gate_proj", np.transpose),
        y + "mlp.wi_1.kernel": scan("mlp.up_proj", np.transpose),
        y + "mlp.wo.kernel": scan("mlp.down_proj", np.transpose),
    })
