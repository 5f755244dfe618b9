"""T5 1.0 as T5X/Flaxformer keep it when scanned. Source: transformers' convert_umt5_checkpoint_to_pytorch.py, t5x examples/scalable_t5 (looked up)."""
import numpy as np

from _common_a import heads_in, heads_out, state, tree

MANNER = "t5x_scan"
ARCHITECTURE = "t5"
NOTES = "scan axis 1 under encoder.encoder / decoder.decoder; head axes kept: query (embed, layers, heads, kv), out (heads, layers, kv, embed); norms (embed, layers); relpos_bias outside the scan (heads, buckets)"
VOCAB, D, HD, FF, ENC, DEC, HEADS, ACT = 101, 48, 8, 80, 2, 3, 4, "relu"
TIES = {n: "shared.weight" for n in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")}
LEFT = ()
EXTRA = ()


def torch_side():
    from transformers import T5Config, T5ForConditionalGeneration
    return state(T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, d_model=D, d_kv=HD, d_ff=FF, num_layers=ENC, num_decoder_layers=DEC,
                                                     num_heads=HEADS, feed_forward_proj=ACT)), TIES)


def flax_side(t):
    out = {"target.token_embedder.embedding": t["shared.weight"]}
    for side, depth in (("encoder", ENC), ("decoder", DEC)):
        def scan(name, move=lambda w: w):
            return np.stack([move(t[f"{side}.block.{i}.layer.{name}.weight"]) for i in range(depth)], axis=1)

        def attention(x, y):
            for p, name in (("q", "query"), ("k", "key"), ("v", "value")):
                out[f"{y}.{name}.kernel"] = scan(f"{x}.{p}", lambda w: heads_in(w, HEADS))
            out[f"{y}.out.kernel"] = scan(f"{x}.o", lambda w: heads_out(w, HEADS))

        y = f"target.{side}.{side}."
        if side == "encoder":
            attention("0.SelfAttention", y + "attention")
            norms, last = ("pre_attention_layer_norm", "pre_mlp_layer_norm"), 1
        else:
            attention("0.SelfAttention", y + "self_attention")
            attention("1.EncDecAttention", y + "encoder_decoder_attention")
            norms, last = ("pre_self_attention_layer_norm", "pre_cross_attention_layer_norm", "pre_mlp_layer_norm"), 2
        for j, norm in enumerate(norms):
            out[f"{y}{norm}.scale"] = scan(f"{j}.layer_norm")
        for p in ("wi", "wo"):
            out[f"{y}mlp.{p}.kernel"] = scan(f"{last}.DenseReluDense.{p}", np.transpose)
        out[f"target.{side}.relpos_bias.rel_embedding"] = t[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].T
        out[f"target.{side}.{side}_norm.scale"] = t[f"{side}.final_layer_norm.weight"]
    return tree(out)
