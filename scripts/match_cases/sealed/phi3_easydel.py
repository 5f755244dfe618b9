"""Phi-3 as EasyDeL's Linen modules kept it. Source: erfanzar/EasyDeL, modules/phi3/modelling_phi3_flax.py (looked up)."""
from _common_a import state, tree

MANNER = "easydel"
ARCHITECTURE = "phi3"
NOTES = "torch's fused qkv_proj and gate_up_proj stay fused; norms hold a 1-d 'kernel'; params prefix; layers.N as string keys"
VOCAB, FF, LAYERS, HEADS, KV, HD = 103, 80, 3, 6, 6, 8
TIES = {}
LEFT = ()
EXTRA = ()


def torch_side():
    from transformers import Phi3Config, Phi3ForCausalLM
    return state(Phi3ForCausalLM(Phi3Config(vocab_size=VOCAB, hidden_size=HEADS * HD, intermediate_size=FF, num_hidden_layers=LAYERS,
                                            num_attention_heads=HEADS, num_key_value_heads=KV, pad_token_id=0,
                                            bos_token_id=0, eos_token_id=0)))


def flax_side(t):
    out = {}
    for name, w in t.items():
        base = name.removesuffix(".weight")
        if base == "model.embed_tokens":
            out[f"params.{base}.embedding"] = w
        else:
            out[f"params.{base}.kernel"] = w.T
    return tree(out)
