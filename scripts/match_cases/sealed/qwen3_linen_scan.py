"""Qwen3 in plain Linen with nn.scan and automatic names. Source: flax.linen conventions (from memory)."""
import numpy as np

from _common_a import heads_in, heads_out, state, tree

MANNER = "linen_scan"
ARCHITECTURE = "qwen3"
NOTES = "leading layer axis; automatic names: RMSNorm_0/1 in the block, SwiGLU_0.Dense_0 (gate), Dense_1 (up), Dense_2 (down); query_ln and key_ln (layers, head_dim); tied"
LAYERS, HEADS, KV, HD = 3, 6, 2, 8
TIES = {"lm_head.weight": "model.embed_tokens.weight"}
LEFT = ()
EXTRA = ()


def torch_side():
    from transformers import Qwen3Config, Qwen3ForCausalLM
    return state(Qwen3ForCausalLM(Qwen3Config(vocab_size=91, hidden_size=32, intermediate_size=80, num_hidden_layers=LAYERS,
                                              num_attention_heads=HEADS, num_key_value_heads=KV, head_dim=HD,
                                              tie_word_embeddings=True)), TIES)


def flax_side(t):
    def block(name, move=lambda w: w):
        return np.stack([move(t[f"model.layers.{i}.{name}.weight"]) for i in range(LAYERS)])

    y = "params.ScanDecoderBlock_0."
    att = y + "GroupedQueryAttention_0."
    out = {
        "params.Embed_0.embedding": t["model.embed_tokens.weight"],
        "params.RMSNorm_0.scale": t["model.norm.weight"],
        y + "RMSNorm_0.scale": block("input_layernorm"),
        y + "RMSNorm_1.scale": block("post_attention_layernorm"),
        att + "query.kernel": block("self_attn.q_proj", lambda w: heads_in(w, HEADS)),
        att + "key.kernel": block("self_attn.k_proj", lambda w: heads_in(w, KV)),
        att + "value.kernel": block("self_attn.v_proj", lambda w: heads_in(w, KV)),
        att + "out.kernel": block("self_attn.o_proj", lambda w: heads_out(w, HEADS)),
        att + "query_ln.scale": block("self_attn.q_norm"),
        att + "key_ln.scale": block("self_attn.k_norm"),
    }
    for j, p in enumerate(("gate_proj", "up_proj", "down_proj")):
        out[f"{y}SwiGLU_0.Dense_{j}.kernel"] = block(f"mlp.{p}", np.transpose)
    return tree(out)
