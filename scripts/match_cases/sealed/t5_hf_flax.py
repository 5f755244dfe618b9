"""T5 as transformers 4's FlaxT5ForConditionalGeneration. Source: huggingface/transformers, modeling_flax_t5.py (looked up)."""
from _common_a import state, tree

MANNER = "hf_flax"
ARCHITECTURE = "t5"
NOTES = "norm leaf is 'weight', as in torch; relative_attention_bias.embedding as torch's (buckets, heads); square attention (4 heads of 12, d_model 48)"
VOCAB, D, HD, FF, ENC, DEC, HEADS, ACT = 89, 48, 12, 72, 2, 2, 4, "relu"
TIES = {n: "shared.weight" for n in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")}
LEFT = ()
EXTRA = ()


def torch_side():
    from transformers import T5Config, T5ForConditionalGeneration
    return state(T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, d_model=D, d_kv=HD, d_ff=FF, num_layers=ENC, num_decoder_layers=DEC,
                                                     num_heads=HEADS, feed_forward_proj=ACT)), TIES)


def flax_side(t):
    out = {}
    for name, w in t.items():
        if name in TIES:
            continue
        base = name.removesuffix(".weight")
        if base == "shared" or base.endswith("relative_attention_bias"):
            out[base + ".embedding"] = w
        elif w.ndim == 2:
            out[base + ".kernel"] = w.T
        else:
            out[base + ".weight"] = w
    return tree(out)
