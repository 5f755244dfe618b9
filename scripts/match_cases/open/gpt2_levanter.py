"""GPT-2 as Levanter keeps it. Source: stanford-crfm/levanter, models/gpt2.py; haliax nn/linear.py (looked up)."""

import numpy as np

from _common_a import in_order, state

MANNER = "levanter"
ARCHITECTURE = "gpt2"
NOTES = "stacked on axis 0; named axes unflattened: c_attn (layers, embed, qkv, heads, head_dim), c_proj (layers, heads, head_dim, embed); out_first=False here; order of fields"
LAYERS, HEADS = 4, 6
TIES = {"lm_head.weight": "transformer.wte.weight"}
LEFT = ()
EXTRA = ()


def torch_side():
    from transformers import GPT2Config, GPT2LMHeadModel

    return state(
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=89,
                n_positions=40,
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

    def block(name, *shape):
        w = np.stack([t[f"transformer.h.{i}.{name}"] for i in range(LAYERS)])
        return w.reshape(LAYERS, *shape) if shape else w

    y = "transformer.blocks.stacked."
    return in_order(
        {
            y + "ln_1.weight": block("ln_1.weight"),
            y + "ln_1.bias": block("ln_1.bias"),
            y + "attn.c_attn.weight": block("attn.c_attn.weight", d, 3, HEADS, d // HEADS),
            y + "attn.c_attn.bias": block("attn.c_attn.bias", 3, HEADS, d // HEADS),
            y + "attn.c_proj.weight": block("attn.c_proj.weight", HEADS, d // HEADS, d),
            y + "attn.c_proj.bias": block("attn.c_proj.bias"),
            y + "ln_2.weight": block("ln_2.weight"),
            y + "ln_2.bias": block("ln_2.bias"),
            y + "mlp.c_fc.weight": block("mlp.c_fc.weight"),
            y + "mlp.c_fc.bias": block("mlp.c_fc.bias"),
            y + "mlp.c_proj.weight": block("mlp.c_proj.weight"),
            y + "mlp.c_proj.bias": block("mlp.c_proj.bias"),
            "transformer.ln_f.weight": t["transformer.ln_f.weight"],
            "transformer.ln_f.bias": t["transformer.ln_f.bias"],
            "embeddings.token_embeddings.weight": t["transformer.wte.weight"],
            "embeddings.position_embeddings.weight": t["transformer.wpe.weight"],
        }
    )
