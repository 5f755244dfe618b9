"""GPT-2 in plain Linen with nn.scan and automatic names. Source: flax.linen conventions (from memory)."""

import numpy as np

from _common_a import state, tree

MANNER = "linen_scan"
ARCHITECTURE = "gpt2"
NOTES = "leading layer axis; fused c_attn split into query/key/value with head axes; automatic names ScanBlock_0, LayerNorm_1, Dense_0; Embed_0/Embed_1"
LAYERS, HEADS = 3, 6
TIES = {"lm_head.weight": "transformer.wte.weight"}
LEFT = ()
EXTRA = ()


def torch_side():
    from transformers import GPT2Config, GPT2LMHeadModel

    return state(
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=97,
                n_positions=32,
                n_embd=48,
                n_layer=LAYERS,
                n_head=HEADS,
                bos_token_id=0,
                eos_token_id=0,
            )
        ),
        TIES,
    )


def flax_side(t):
    d = t["transformer.wte.weight"].shape[1]

    def block(name, move=lambda w: w):
        return np.stack([move(t[f"transformer.h.{i}.{name}"]) for i in range(LAYERS)])

    y = "params.ScanBlock_0."
    mha, mlp = y + "MultiHeadDotProductAttention_0.", y + "MlpBlock_0."
    out = {
        "params.Embed_0.embedding": t["transformer.wte.weight"],
        "params.Embed_1.embedding": t["transformer.wpe.weight"],
        "params.LayerNorm_0.scale": t["transformer.ln_f.weight"],
        "params.LayerNorm_0.bias": t["transformer.ln_f.bias"],
        mha + "out.kernel": block("attn.c_proj.weight", lambda w: w.reshape(HEADS, -1, d)),
        mha + "out.bias": block("attn.c_proj.bias"),
        mlp + "Dense_0.kernel": block("mlp.c_fc.weight"),
        mlp + "Dense_0.bias": block("mlp.c_fc.bias"),
        mlp + "Dense_1.kernel": block("mlp.c_proj.weight"),
        mlp + "Dense_1.bias": block("mlp.c_proj.bias"),
    }
    for j in (0, 1):
        out[y + f"LayerNorm_{j}.scale"] = block(f"ln_{j + 1}.weight")
        out[y + f"LayerNorm_{j}.bias"] = block(f"ln_{j + 1}.bias")
    for j, part in enumerate(("query", "key", "value")):
        out[mha + part + ".kernel"] = block(
            "attn.c_attn.weight", lambda w: np.split(w, 3, axis=1)[j].reshape(d, HEADS, -1)
        )
        out[mha + part + ".bias"] = block(
            "attn.c_attn.bias", lambda b: np.split(b, 3)[j].reshape(HEADS, -1)
        )
    return tree(out)
