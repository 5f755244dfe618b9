"""Phi-3 as vLLM's TPU backend keeps it. Source: vllm-project/tpu-inference, models/jax/phi3.py (looked up)."""
from _common_a import heads_out, state, tree

MANNER = "tpu_inference"
ARCHITECTURE = "phi3"
NOTES = "NNX; qkv_proj.kernel (embed, heads + 2 * kv_heads, head_dim), o_proj.kernel (heads, head_dim, embed); gate_up (embed, 2 * hidden); model.lm_head is a bare array (embed, vocab)"
VOCAB, FF, LAYERS, HEADS, KV, HD = 89, 88, 2, 6, 2, 12
TIES = {}
LEFT = ()
EXTRA = ()


def torch_side():
    from transformers import Phi3Config, Phi3ForCausalLM
    return state(Phi3ForCausalLM(Phi3Config(vocab_size=VOCAB, hidden_size=HEADS * HD, intermediate_size=FF, num_hidden_layers=LAYERS,
                                            num_attention_heads=HEADS, num_key_value_heads=KV, pad_token_id=0,
                                            bos_token_id=0, eos_token_id=0)))


def flax_side(t):
    d = HEADS * HD
    out = {
        "model.embed.embedding": t["model.embed_tokens.weight"],
        "model.norm.scale": t["model.norm.weight"],
        "model.lm_head": t["lm_head.weight"].T,
    }
    for i in range(LAYERS):
        y = f"model.layers.{i}."
        out[y + "self_attn.qkv_proj.kernel"] = t[y + "self_attn.qkv_proj.weight"].reshape(HEADS + 2 * KV, HD, d).transpose(2, 0, 1)
        out[y + "self_attn.o_proj.kernel"] = heads_out(t[y + "self_attn.o_proj.weight"], HEADS)
        out[y + "mlp.gate_up_proj.kernel"] = t[y + "mlp.gate_up_proj.weight"].T
        out[y + "mlp.down_proj.kernel"] = t[y + "mlp.down_proj.weight"].T
        for p in ("input_layernorm", "post_attention_layernorm"):
            out[f"{y}{p}.scale"] = t[f"{y}{p}.weight"]
    return tree(out)
