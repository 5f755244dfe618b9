"""Phi-3 in one engineer's own tree. Source: invented (from memory)."""
import numpy as np

from _common_a import heads_out, state, tree

MANNER = "own"
ARCHITECTURE = "phi3"
NOTES = "stacked on axis 0; q apart, k and v together as (layers, 2, embed, kv_heads, head_dim); gate and up interleaved column by column in w_in (layers, embed, 2 * hidden)"
VOCAB, FF, LAYERS, HEADS, KV, HD = 101, 64, 4, 6, 3, 8
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

    def layers(name, move=lambda w: w):
        return np.stack([move(t[f"model.layers.{i}.{name}.weight"]) for i in range(LAYERS)])

    def wq(w):
        return w[:d].reshape(HEADS, HD, d).transpose(2, 0, 1)

    def wkv(w):
        return w[d:].reshape(2, KV, HD, d).transpose(0, 3, 1, 2)

    def w_in(w):
        return w.reshape(2, FF, d).transpose(2, 1, 0).reshape(d, 2 * FF)

    return tree({
        "embed.tok": t["model.embed_tokens.weight"],
        "head.ln": t["model.norm.weight"],
        "head.w": t["lm_head.weight"].T,
        "trunk.attn.ln": layers("input_layernorm"),
        "trunk.attn.wq": layers("self_attn.qkv_proj", wq),
        "trunk.attn.wkv": layers("self_attn.qkv_proj", wkv),
        "trunk.attn.wo": layers("self_attn.o_proj", lambda w: heads_out(w, HEADS)),
        "trunk.ffn.ln": layers("post_attention_layernorm"),
        "trunk.ffn.w_in": layers("mlp.gate_up_proj", w_in),
        "trunk.ffn.w_out": layers("mlp.down_proj", np.transpose),
    })
