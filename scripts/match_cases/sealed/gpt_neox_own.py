"""GPT-NeoX in one engineer's own tree. Source: invented (from memory)."""
from _common_a import heads_out, state, tree

MANNER = "own"
ARCHITECTURE = "gpt_neox"
NOTES = "wqkv reordered to (embed, 3, heads, head_dim), bqkv (3, heads, head_dim): head and part swap places; one-letter leaves w, b, g; h00 names; unembed kept (vocab, embed)"
VOCAB, LAYERS, HEADS, HD = 107, 2, 4, 10
TIES = {}
LEFT = ()
EXTRA = ()


def torch_side():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    return state(GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCAB, hidden_size=HEADS * HD, intermediate_size=4 * HEADS * HD,
                                                  num_hidden_layers=LAYERS, num_attention_heads=HEADS,
                                                  bos_token_id=0, eos_token_id=0)))


def flax_side(t):
    d = HEADS * HD
    out = {
        "wte": t["gpt_neox.embed_in.weight"],
        "wue": t["lm_head.weight"],
        "ln_out.g": t["gpt_neox.final_layer_norm.weight"],
        "ln_out.b": t["gpt_neox.final_layer_norm.bias"],
    }
    for i in range(LAYERS):
        x, y = f"gpt_neox.layers.{i}.", f"h{i:02d}."
        for mine, torch in (("ln_attn", "input_layernorm"), ("ln_ff", "post_attention_layernorm")):
            out[f"{y}{mine}.g"] = t[f"{x}{torch}.weight"]
            out[f"{y}{mine}.b"] = t[f"{x}{torch}.bias"]
        out[y + "attn.wqkv"] = t[x + "attention.query_key_value.weight"].reshape(HEADS, 3, HD, d).transpose(3, 1, 0, 2)
        out[y + "attn.bqkv"] = t[x + "attention.query_key_value.bias"].reshape(HEADS, 3, HD).swapaxes(0, 1)
        out[y + "attn.wo"] = heads_out(t[x + "attention.dense.weight"], HEADS)
        out[y + "attn.bo"] = t[x + "attention.dense.bias"]
        for mine, torch in (("fc_up", "dense_h_to_4h"), ("fc_down", "dense_4h_to_h")):
            out[f"{y}ff.{mine}.w"] = t[f"{x}mlp.{torch}.weight"].T
            out[f"{y}ff.{mine}.b"] = t[f"{x}mlp.{torch}.bias"]
    return tree(out)
