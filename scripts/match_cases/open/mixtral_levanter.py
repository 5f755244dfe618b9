"""Mixtral as Levanter keeps it. Source: stanford-crfm/levanter, models/mixtral.py; haliax MoELinear (looked up)."""

import numpy as np

from _common_a import in_order, state

MANNER = "levanter"
ARCHITECTURE = "mixtral"
NOTES = "torch side is the state_dict of transformers 5 (fused gate_up_proj of all experts); experts.w1/w2/w3 (layers, experts, in, out), gate (layers, experts, embed): out first; order of fields"
VOCAB, FF, LAYERS, HEADS, KV, HD, EXPERTS = 89, 72, 3, 6, 2, 8, 5
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
    return state(model)


def flax_side(t):
    d = HEADS * HD

    def block(name, *shape):
        w = np.stack([t[f"model.layers.{i}.{name}"] for i in range(LAYERS)])
        return w.reshape(LAYERS, *shape) if shape else w

    up = block("mlp.experts.gate_up_proj")
    y = "transformer.layers.stacked."
    return in_order(
        {
            y + "self_attn.q_proj.weight": block("self_attn.q_proj.weight", KV, HEADS // KV, HD, d),
            y + "self_attn.k_proj.weight": block("self_attn.k_proj.weight", KV, HD, d),
            y + "self_attn.v_proj.weight": block("self_attn.v_proj.weight", KV, HD, d),
            y + "self_attn.o_proj.weight": block("self_attn.o_proj.weight", d, HEADS, HD),
            y + "block_sparse_moe.gate.weight": block("mlp.gate.weight"),
            y + "block_sparse_moe.experts.w1.weight": up[:, :, :FF].swapaxes(2, 3),
            y + "block_sparse_moe.experts.w2.weight": block("mlp.experts.down_proj").swapaxes(2, 3),
            y + "block_sparse_moe.experts.w3.weight": up[:, :, FF:].swapaxes(2, 3),
            y + "input_layernorm.weight": block("input_layernorm.weight"),
            y + "post_attention_layernorm.weight": block("post_attention_layernorm.weight"),
            "transformer.norm.weight": t["model.norm.weight"],
            "embeddings.token_embeddings.weight": t["model.embed_tokens.weight"],
            "lm_head.weight": t["lm_head.weight"],
        }
    )
