"""Qwen3 as Tunix keeps it. Source: google/tunix, models/qwen3/params.py (looked up)."""
from _common_a import heads_in, heads_out, state, tree

MANNER = "tunix"
ARCHITECTURE = "qwen3"
NOTES = "NNX; attention, norms and head have leaf 'w', the MLP 'kernel'; q (embed, heads, head_dim), o (heads, head_dim, embed); 4 heads of 16 = hidden 64: square"
LAYERS, HEADS, KV, HD = 2, 4, 2, 16
TIES = {}
LEFT = ()
EXTRA = ()


def torch_side():
    from transformers import Qwen3Config, Qwen3ForCausalLM
    return state(Qwen3ForCausalLM(Qwen3Config(vocab_size=113, hidden_size=64, intermediate_size=104, num_hidden_layers=LAYERS,
                                              num_attention_heads=HEADS, num_key_value_heads=KV, head_dim=HD)))


def flax_side(t):
    out = {
        "embedder.input_embedding": t["model.embed_tokens.weight"],
        "final_norm.w": t["model.norm.weight"],
        "lm_head.w": t["lm_head.weight"].T,
    }
    for i in range(LAYERS):
        x, y = f"model.layers.{i}.", f"layers.{i}."
        for p, h in (("q", HEADS), ("k", KV), ("v", KV)):
            out[f"{y}attn.{p}_proj.w"] = heads_in(t[f"{x}self_attn.{p}_proj.weight"], h)
        out[y + "attn.o_proj.w"] = heads_out(t[x + "self_attn.o_proj.weight"], HEADS)
        for p in ("q_norm", "k_norm"):
            out[f"{y}attn.{p}.w"] = t[f"{x}self_attn.{p}.weight"]
        for p in ("gate_proj", "up_proj", "down_proj"):
            out[f"{y}mlp.{p}.kernel"] = t[f"{x}mlp.{p}.weight"].T
        for p in ("input_layernorm", "post_attention_layernorm"):
            out[f"{y}{p}.w"] = t[f"{x}{p}.weight"]
    return tree(out)
