"""Phi-3 in MaxText's manner, scanned, nothing fused. Source: AI-Hypercomputer/maxtext, layers/attentions.py, linears.py (looked up; it has no Phi-3)."""
import numpy as np

from _common_a import heads_in, heads_out, state, tree

MANNER = "maxtext"
ARCHITECTURE = "phi3"
NOTES = "torch's fused qkv (unequal parts, GQA) and gate_up are split: query/key/value, wi_0/wi_1; scan axis 1"
VOCAB, FF, LAYERS, HEADS, KV, HD = 97, 80, 3, 6, 2, 12
TIES = {}
LEFT = ()
EXTRA = ()


def torch_side():
    from transformers import Phi3Config, Phi3ForCausalLM
    return state(Phi3ForCausalLM(Phi3Config(vocab_size=VOCAB, hidden_size=HEADS * HD, intermediate_size=FF, num_hidden_layers=LAYERS,
                                            num_attention_heads=HEADS, num_key_value_heads=KV, pad_token_id=0,
                                            bos_token_id=0, eos_token_id=0)))


def flax_side(t):
    def scan(name, move=lambda w: w):
        return np.stack([move(t[f"model.layers.{i}.{name}.weight"]) for i in range(LAYERS)], axis=1)

    y = "params.decoder.layers."
    out = {
        "params.token_embedder.embedding": t["model.embed_tokens.weight"],
        "params.decoder.decoder_norm.scale": t["model.norm.weight"],
        "params.decoder.logits_dense.kernel": t["lm_head.weight"].T,
        y + "pre_self_attention_layer_norm.scale": scan("input_layernorm"),
        y + "post_self_attention_layer_norm.scale": scan("post_attention_layernorm"),
        y + "self_attention.out.kernel": scan("self_attn.o_proj", lambda w: heads_out(w, HEADS)),
        y + "mlp.wi_0.kernel": scan("mlp.gate_up_proj", lambda w: w[:FF].T),
        y + "mlp.wi_1.kernel": scan("mlp.gate_up_proj", lambda w: w[FF:].T),
        y + "mlp.wo.kernel": scan("mlp.down_proj", np.transpose),
    }
    start = 0
    for part, h in (("query", HEADS), ("key", KV), ("value", KV)):
        rows = slice(start, start + h * HD)
        out[f"{y}self_attention.{part}.kernel"] = scan("self_attn.qkv_proj", lambda w: heads_in(w[rows], h))
        start += h * HD
    return tree(out)
