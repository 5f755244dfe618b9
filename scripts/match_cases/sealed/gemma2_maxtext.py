"""Gemma 2 as MaxText keeps it, scanned over pairs. Source: AI-Hypercomputer/maxtext, param_mapping.py, GEMMA2, convert_gemma2_chkpt.py (looked up)."""
import numpy as np

from _common_a import heads_in, heads_out, state, tree

MANNER = "maxtext"
ARCHITECTURE = "gemma2"
NOTES = "one scanned layer = a local (even) and a global (odd) torch layer, stacked on axis 1; its converter's +1 on norms and scaling of query and embedding are left out (nothing computed here)"
LAYERS, HEADS, KV, HD = 4, 6, 3, 12
TIES = {"lm_head.weight": "model.embed_tokens.weight"}
LEFT = ()
EXTRA = ()


def torch_side():
    from transformers import Gemma2Config, Gemma2ForCausalLM
    return state(Gemma2ForCausalLM(Gemma2Config(vocab_size=97, hidden_size=36, intermediate_size=64, num_hidden_layers=LAYERS,
                                                num_attention_heads=HEADS, num_key_value_heads=KV, head_dim=HD)), TIES)


def flax_side(t):
    out = {
        "params.token_embedder.embedding": t["model.embed_tokens.weight"],
        "params.decoder.decoder_norm.scale": t["model.norm.weight"],
    }
    for start, kind in ((0, "local"), (1, "global")):
        def scan(name, move=lambda w: w):
            return np.stack([move(t[f"model.layers.{i}.{name}.weight"]) for i in range(start, LAYERS, 2)], axis=1)

        y = "params.decoder.layers."
        att, mlp = f"{y}self_attention_{kind}.", f"{y}mlp_{kind}."
        out[att + "query.kernel"] = scan("self_attn.q_proj", lambda w: heads_in(w, HEADS))
        out[att + "key.kernel"] = scan("self_attn.k_proj", lambda w: heads_in(w, KV))
        out[att + "value.kernel"] = scan("self_attn.v_proj", lambda w: heads_in(w, KV))
        out[att + "out.kernel"] = scan("self_attn.o_proj", lambda w: heads_out(w, HEADS))
        out[mlp + "wi_0.kernel"] = scan("mlp.gate_proj", np.transpose)
        out[mlp + "wi_1.kernel"] = scan("mlp.up_proj", np.transpose)
        out[mlp + "wo.kernel"] = scan("mlp.down_proj", np.transpose)
        out[f"{y}pre_self_attention_norm_{kind}.scale"] = scan("input_layernorm")
        out[f"{y}post_self_attention_norm_{kind}.scale"] = scan("post_attention_layernorm")
        out[f"{y}pre_ffw_norm_{kind}.scale"] = scan("pre_feedforward_layernorm")
        out[f"{y}post_ffw_norm_{kind}.scale"] = scan("post_feedforward_layernorm")
    return tree(out)
