"""Mixtral in Tunix's manner. Source: google/tunix, models/qwen3 (its MoELayer and params.py; looked up, carried over to Mixtral)."""
import numpy as np

from _common_a import heads_in, heads_out, state, tree

MANNER = "tunix"
ARCHITECTURE = "mixtral"
NOTES = "torch side is the state_dict of transformers 5; its fused gate_up_proj (experts, 2 * hidden, embed) is split; NNX lists, bare leaves gate_proj/up_proj/down_proj (experts, in, out), router.kernel"
VOCAB, FF, LAYERS, HEADS, KV, HD, EXPERTS = 103, 80, 3, 4, 2, 12, 4
TIES = {}
LEFT = ()
EXTRA = ()


def torch_side():
    from transformers import MixtralConfig, MixtralForCausalLM
    model = MixtralForCausalLM(MixtralConfig(vocab_size=VOCAB, hidden_size=HEADS * HD, intermediate_size=FF, num_hidden_layers=LAYERS,
                                             num_attention_heads=HEADS, num_key_value_heads=KV, num_local_experts=EXPERTS))
    return state(model)


def flax_side(t):
    out = {
        "embedder.input_embedding": t["model.embed_tokens.weight"],
        "final_norm.w": t["model.norm.weight"],
        "lm_head.w": t["lm_head.weight"].T,
    }
    for i in range(LAYERS):
        x, y = f"model.layers.{i}.", f"layers.{i}."
        for p, h in (("q", HEADS), ("k", KV), ("v", KV)):
            out[f"{y}attn.{p}_proj.w"] = heads_in(t[f"{x}self_attn.{p}_proj.weight"], h)
        out[y + "attn.o_proj.w"] = heads_out(t[x + "self_attn.o_proj.weight"], HEADS)
        gate, up = np.split(t[x + "mlp.experts.gate_up_proj"], 2, axis=1)
        out[y + "mlp.router.kernel"] = t[x + "mlp.gate.weight"].T
        out[y + "mlp.gate_proj"] = gate.swapaxes(1, 2)
        out[y + "mlp.up_proj"] = up.swapaxes(1, 2)
        out[y + "mlp.down_proj"] = t[x + "mlp.experts.down_proj"].swapaxes(1, 2)
        for p in ("input_layernorm", "post_attention_layernorm"):
            out[f"{y}{p}.w"] = t[f"{x}{p}.weight"]
    return tree(out)
