"""T5 in Bonsai's manner. Source: jax-ml/bonsai, models/umt5/modeling.py (looked up; carried over to T5, whose bias is in block 0 only)."""
import numpy as np

from _common_a import state, tree

MANNER = "bonsai"
ARCHITECTURE = "t5"
NOTES = "the shared embedding is one NNX object, so the state holds it once, at the path met first: decoder.embed_tokens; norm leaf 'scale'; the dropout stream's count and key are in the state"
VOCAB, D, HD, FF, ENC, DEC, HEADS, ACT = 103, 40, 10, 64, 2, 4, 6, "gated-gelu"
TIES = {n: "shared.weight" for n in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")}
LEFT = ()
EXTRA = ("decoder.dropout.rngs.count", "decoder.dropout.rngs.key")


def torch_side():
    from transformers import T5Config, T5ForConditionalGeneration
    return state(T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, d_model=D, d_kv=HD, d_ff=FF, num_layers=ENC, num_decoder_layers=DEC,
                                                     num_heads=HEADS, feed_forward_proj=ACT)), TIES)


def flax_side(t):
    out = {
        "decoder.embed_tokens.embedding": t["shared.weight"],
        "decoder.dropout.rngs.count": np.array(0, np.uint32),
        "decoder.dropout.rngs.key": np.array([0, 42], np.uint32),
    }
    for name, w in t.items():
        base = name.removesuffix(".weight")
        if base == "shared" or name in TIES:
            continue
        if base.endswith("relative_attention_bias"):
            out[base + ".embedding"] = w
        else:
            out[base + (".kernel" if w.ndim == 2 else ".scale")] = w.T
    return tree(out)
