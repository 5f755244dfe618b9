"""T5 as T5X keeps it, not scanned. Source: google-research/t5x, examples/t5/network.py, layers.py (looked up)."""
import numpy as np

from _common_a import state, tree

MANNER = "t5x"
ARCHITECTURE = "t5"
NOTES = "kernels are 2-d (embed, joined_kv); rel_embedding (heads, buckets) is transposed against torch's; 'target' prefix and a step counter; encoder and decoder of different depth; logits via embedding"
VOCAB, D, HD, FF, ENC, DEC, HEADS, ACT = 97, 40, 8, 56, 3, 2, 6, "gated-gelu"
TIES = {n: "shared.weight" for n in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")}
LEFT = ()
EXTRA = ("state.step",)


def torch_side():
    from transformers import T5Config, T5ForConditionalGeneration
    return state(T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, d_model=D, d_kv=HD, d_ff=FF, num_layers=ENC, num_decoder_layers=DEC,
                                                     num_heads=HEADS, feed_forward_proj=ACT)), TIES)


def flax_side(t):
    out = {"target.token_embedder.embedding": t["shared.weight"], "state.step": np.array(1000, np.int32)}

    def attention(x, y):
        for p, name in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
            out[f"{y}.{name}.kernel"] = t[f"{x}.{p}.weight"].T

    for side, depth in (("encoder", ENC), ("decoder", DEC)):
        for i in range(depth):
            x, y = f"{side}.block.{i}.layer.", f"target.{side}.layers_{i}."
            last = 1 if side == "encoder" else 2
            if side == "encoder":
                attention(x + "0.SelfAttention", y + "attention")
                out[y + "pre_attention_layer_norm.scale"] = t[x + "0.layer_norm.weight"]
            else:
                attention(x + "0.SelfAttention", y + "self_attention")
                attention(x + "1.EncDecAttention", y + "encoder_decoder_attention")
                out[y + "pre_self_attention_layer_norm.scale"] = t[x + "0.layer_norm.weight"]
                out[y + "pre_cross_attention_layer_norm.scale"] = t[x + "1.layer_norm.weight"]
            out[y + "pre_mlp_layer_norm.scale"] = t[f"{x}{last}.layer_norm.weight"]
            for p in ("wi_0", "wi_1", "wo"):
                out[f"{y}mlp.{p}.kernel"] = t[f"{x}{last}.DenseReluDense.{p}.weight"].T
        out[f"target.{side}.relpos_bias.rel_embedding"] = t[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].T
        out[f"target.{side}.{side}_norm.scale"] = t[f"{side}.final_layer_norm.weight"]
    return tree(out)
