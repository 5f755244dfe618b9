"""Llama in one engineer's own tree. Source: invented (from memory of Megatron-like packings)."""
import numpy as np

from _common_a import state, tree

MANNER = "own"
ARCHITECTURE = "llama"
NOTES = "wqkv packed by kv group: (embed, kv_heads, q_per_group + 2, head_dim); wo (kv_heads, q_per_group, head_dim, embed); gate and up in one (embed, 2, hidden); leaves without 'kernel'"
LAYERS, HEADS, KV, HD = 2, 6, 2, 12
TIES = {}
LEFT = ()
EXTRA = ()


def torch_side():
    from transformers import LlamaConfig, LlamaForCausalLM
    return state(LlamaForCausalLM(LlamaConfig(vocab_size=107, hidden_size=72, intermediate_size=96, num_hidden_layers=LAYERS,
                                              num_attention_heads=HEADS, num_key_value_heads=KV)))


def flax_side(t):
    d, g = t["model.norm.weight"].shape[0], HEADS // KV
    out = {"tok_emb": t["model.embed_tokens.weight"], "out_ln": t["model.norm.weight"], "unemb": t["lm_head.weight"].T}
    for i in range(LAYERS):
        x, y = f"model.layers.{i}.", f"blocks.{i}."
        q, k, v, o = (t[f"{x}self_attn.{p}_proj.weight"] for p in "qkvo")
        packed = np.concatenate([q.reshape(KV, g, HD, d), k.reshape(KV, 1, HD, d), v.reshape(KV, 1, HD, d)], axis=1)
        out[y + "in_ln"] = t[x + "input_layernorm.weight"]
        out[y + "attn.wqkv"] = packed.transpose(3, 0, 1, 2)
        out[y + "attn.wo"] = o.T.reshape(KV, g, HD, d)
        out[y + "mid_ln"] = t[x + "post_attention_layernorm.weight"]
        out[y + "ffn.fc_in"] = np.stack([t[x + "mlp.gate_proj.weight"].T, t[x + "mlp.up_proj.weight"].T], axis=1)
        out[y + "ffn.fc_out"] = t[x + "mlp.down_proj.weight"].T
    return tree(out)
