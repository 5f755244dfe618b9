"""Mixtral as FlaxMixtralForCausalLM. Source: modeling_flax_mixtral.py of a transformers branch (looked up)."""

from _common_a import saved, tree

MANNER = "hf_flax"
ARCHITECTURE = "mixtral"
NOTES = "torch side is the published spelling; experts stay apart but w1/w2/w3 are called gate_proj/down_proj/up_proj; RMSNorm leaf is 'weight'"
VOCAB, FF, LAYERS, HEADS, KV, HD, EXPERTS = 101, 64, 2, 6, 3, 8, 4
TIES = {}
LEFT = ()
EXTRA = ()


def torch_side():
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB,
            hidden_size=HEADS * HD,
            intermediate_size=FF,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV,
            num_local_experts=EXPERTS,
        )
    )
    return saved(model)


def flax_side(t):
    out = {}
    for name, w in t.items():
        base = name.removesuffix(".weight")
        for theirs, flax in ((".w1", ".gate_proj"), (".w2", ".down_proj"), (".w3", ".up_proj")):
            base = base[:-3] + flax if base.endswith(theirs) else base
        if base == "model.embed_tokens":
            out[base + ".embedding"] = w
        else:
            out[base + (".kernel" if w.ndim == 2 else ".weight")] = w.T
    return tree(out)
