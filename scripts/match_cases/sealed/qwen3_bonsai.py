"""Qwen3 as Bonsai keeps it. Source: jax-ml/bonsai, models/qwen3/modeling.py and params.py (looked up)."""
from _common_a import heads_in, heads_out, state, tree

MANNER = "bonsai"
ARCHITECTURE = "qwen3"
NOTES = "nnx.Einsum kernels with head axes (embed, heads, head_dim), head_dim * heads != hidden; per-layer lists; lm_head (embed, vocab)"
LAYERS, HEADS, KV, HD = 3, 4, 2, 16
TIES = {}
LEFT = ()
EXTRA = ()


def torch_side():
    from transformers import Qwen3Config, Qwen3ForCausalLM
    return state(Qwen3ForCausalLM(Qwen3Config(vocab_size=97, hidden_size=40, intermediate_size=72, num_hidden_layers=LAYERS,
                                              num_attention_heads=HEADS, num_key_value_heads=KV, head_dim=HD)))


def flax_side(t):
    out = {
        "embedder.embedding": t["model.embed_tokens.weight"],
        "final_norm.scale": t["model.norm.weight"],
        "lm_head.kernel": t["lm_head.weight"].T,
    }
    for i in range(LAYERS):
        x, y = f"model.layers.{i}.", f"layers.{i}."
        for p, h in (("q", HEADS), ("k", KV), ("v", KV)):
            out[f"{y}attn.{p}_proj.kernel"] = heads_in(t[f"{x}self_attn.{p}_proj.weight"], h)
        out[y + "attn.o_proj.kernel"] = heads_out(t[x + "self_attn.o_proj.weight"], HEADS)
        for p in ("q_norm", "k_norm"):
            out[f"{y}attn.{p}.scale"] = t[f"{x}self_attn.{p}.weight"]
        for p in ("gate_proj", "up_proj", "down_proj"):
            out[f"{y}mlp.{p}.kernel"] = t[f"{x}mlp.{p}.weight"].T
        for p in ("input_layernorm", "post_attention_layernorm"):
            out[f"{y}{p}.scale"] = t[f"{x}{p}.weight"]
    return tree(out)
