"""GPT-2 in MaxText's gpt3 decoder, scanned, fused_qkv. Source: AI-Hypercomputer/maxtext, models/gpt3.py and convert_gpt3_ckpt_from_paxml.py (looked up)."""
import numpy as np

from _common_a import state, tree

MANNER = "maxtext"
ARCHITECTURE = "gpt2"
NOTES = "scan axis 1; qkv_proj (embed, layers, 3, heads, head_dim), its bias (3, layers, heads, head_dim); norm of the MLP lives inside it; logits via embedding"
LAYERS, HEADS = 2, 4
TIES = {"lm_head.weight": "transformer.wte.weight"}
LEFT = ()
EXTRA = ()


def torch_side():
    from transformers import GPT2Config, GPT2LMHeadModel
    return state(GPT2LMHeadModel(GPT2Config(vocab_size=101, n_positions=36, n_embd=48, n_layer=LAYERS, n_head=HEADS,
                                            bos_token_id=0, eos_token_id=0)), TIES)


def flax_side(t):
    d = t["transformer.wte.weight"].shape[1]

    def scan(name, move=lambda w: w):
        return np.stack([move(t[f"transformer.h.{i}.{name}"]) for i in range(LAYERS)], axis=1)

    y = "params.decoder.layers."
    return tree({
        "params.token_embedder.embedding": t["transformer.wte.weight"],
        "params.decoder.position_embedder.embedding": t["transformer.wpe.weight"],
        "params.decoder.decoder_norm.scale": t["transformer.ln_f.weight"],
        "params.decoder.decoder_norm.bias": t["transformer.ln_f.bias"],
        y + "pre_self_attention_norm.scale": scan("ln_1.weight"),
        y + "pre_self_attention_norm.bias": scan("ln_1.bias"),
        y + "self_attention.qkv_proj.kernel": scan("attn.c_attn.weight", lambda w: w.reshape(d, 3, HEADS, -1)),
        y + "self_attention.qkv_proj.bias": scan("attn.c_attn.bias", lambda b: b.reshape(3, HEADS, -1)),
        y + "self_attention.out.kernel": scan("attn.c_proj.weight", lambda w: w.reshape(HEADS, -1, d)),
        y + "self_attention.out.bias": scan("attn.c_proj.bias"),
        y + "mlp.mlp_layer_norm.scale": scan("ln_2.weight"),
        y + "mlp.mlp_layer_norm.bias": scan("ln_2.bias"),
        y + "mlp.wi.kernel": scan("mlp.c_fc.weight"),
        y + "mlp.wi.bias": scan("mlp.c_fc.bias"),
        y + "mlp.wo.kernel": scan("mlp.c_proj.weight"),
        y + "mlp.wo.bias": scan("mlp.c_proj.bias"),
    })
