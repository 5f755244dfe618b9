"""GPT-NeoX as FlaxGPTNeoXForCausalLM. Source: huggingface/transformers, a branch's modeling_flax_gpt_neox.py (looked up)."""

from _common_a import state, tree

MANNER = "hf_flax"
ARCHITECTURE = "gpt_neox"
NOTES = "query_key_value stays fused, per head (heads, 3, head_dim) as in torch; transformers 5 calls the head lm_head, Flax still embed_out"
VOCAB, LAYERS, HEADS, HD = 97, 3, 4, 12
TIES = {}
LEFT = ()
EXTRA = ()


def torch_side():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return state(
        GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=VOCAB,
                hidden_size=HEADS * HD,
                intermediate_size=4 * HEADS * HD,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    )


def flax_side(t):
    out = {}
    for name, w in t.items():
        base, leaf = name.rsplit(".", 1)
        if base == "lm_head":
            out["embed_out.kernel"] = w.T
        elif base == "gpt_neox.embed_in":
            out[base + ".embedding"] = w
        elif leaf == "bias":
            out[name] = w
        else:
            out[base + (".kernel" if w.ndim == 2 else ".scale")] = w.T
    return tree(out)
