"""Llama as EasyLM keeps it. Source: young-geng/EasyLM, models/llama/convert_hf_to_easylm.py (looked up)."""

from _common_a import pair_rope, state, tree

MANNER = "easylm"
ARCHITECTURE = "llama"
NOTES = "wq and wk are permuted to rotary of neighbouring pairs; norms hold a 1-d 'kernel'; w2 is the down projection; GQA"
LAYERS, HEADS, KV = 3, 8, 4
TIES = {}
LEFT = ()
EXTRA = ()


def torch_side():
    from transformers import LlamaConfig, LlamaForCausalLM

    return state(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=101,
                hidden_size=48,
                intermediate_size=88,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                num_key_value_heads=KV,
            )
        )
    )


def flax_side(t):
    out = {
        "transformer.wte.embedding": t["model.embed_tokens.weight"],
        "transformer.ln_f.kernel": t["model.norm.weight"],
        "lm_head.kernel": t["lm_head.weight"].T,
    }
    for i in range(LAYERS):
        x, y = f"model.layers.{i}.", f"transformer.h.{i}."
        out[y + "attention.wq.kernel"] = pair_rope(t[x + "self_attn.q_proj.weight"], HEADS).T
        out[y + "attention.wk.kernel"] = pair_rope(t[x + "self_attn.k_proj.weight"], KV).T
        out[y + "attention.wv.kernel"] = t[x + "self_attn.v_proj.weight"].T
        out[y + "attention.wo.kernel"] = t[x + "self_attn.o_proj.weight"].T
        out[y + "feed_forward.w1.kernel"] = t[x + "mlp.gate_proj.weight"].T
        out[y + "feed_forward.w2.kernel"] = t[x + "mlp.down_proj.weight"].T
        out[y + "feed_forward.w3.kernel"] = t[x + "mlp.up_proj.weight"].T
        out[y + "attention_norm.kernel"] = t[x + "input_layernorm.weight"]
        out[y + "ffn_norm.kernel"] = t[x + "post_attention_layernorm.weight"]
    return tree(out)
