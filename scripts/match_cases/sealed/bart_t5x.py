"""BART in the manner of T5X's scalable T5. Source: t5x/examples/scalable_t5/network.py (looked up), its 2-D DenseGeneral kernels
from memory; T5X has no BART: the biases, position tables and post-norms are written in its manner.
"""
import numpy as np
from _common_b import arrays, dense, embed, finish, layers, nest, norm, put, stack

MANNER = "t5x"
ARCHITECTURE = "bart"
NOTES = ("target.* with the optimiser's state.step beside it; layers scanned on axis 1: kernels (embed, layers, joined_kv), norms and "
         "biases (embed, layers); heads joined; encoder_decoder_attention; the logits' bias (vocab,) from torch's (1, vocab)")


def torch_side():
    from transformers import BartConfig, BartForConditionalGeneration
    return arrays(BartForConditionalGeneration(BartConfig(
        vocab_size=122, d_model=48, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=192, decoder_ffn_dim=192, max_position_embeddings=30)), TIES)


def attention(t, p):
    return nest(query=dense(t, p + "q_proj"), key=dense(t, p + "k_proj"), value=dense(t, p + "v_proj"), out=dense(t, p + "out_proj"))


def layer(t, p):
    mlp = dict(mlp=nest(wi=dense(t, p + "fc1"), wo=dense(t, p + "fc2")), post_mlp_layer_norm=norm(t, p + "final_layer_norm"))
    if p + "encoder_attn.q_proj.weight" not in t:
        return nest(attention=attention(t, p + "self_attn."),
                    post_attention_layer_norm=norm(t, p + "self_attn_layer_norm"), **mlp)
    return nest(self_attention=attention(t, p + "self_attn."),
                post_self_attention_layer_norm=norm(t, p + "self_attn_layer_norm"),
                encoder_decoder_attention=attention(t, p + "encoder_attn."),
                post_cross_attention_layer_norm=norm(t, p + "encoder_attn_layer_norm"), **mlp)


def flax_side(t):
    out = {"state/step": np.array(1100000, np.int32), "target/decoder/logits_bias": t["final_logits_bias"][0]}
    put(out, "target/token_embedder", embed(t, "model.shared"))
    for side in ("encoder", "decoder"):
        p = f"model.{side}."
        n = layers(t, p + "layers.")
        put(out, f"target/{side}", nest(
            layers=stack([layer(t, f"{p}layers.{i}.") for i in range(n)], 1),
            position_embedder=embed(t, p + "embed_positions"), embedding_norm=norm(t, p + "layernorm_embedding")))
    return finish(out)


LEFT = ()
EXTRA = ("state.step",)
TIES = {n: "model.shared.weight" for n in
        ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")}
