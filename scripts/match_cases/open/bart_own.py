"""BART as ayaka14732/bart-base-jax keeps it (plain JAX). Source: lib/param_utils/flax2jax.py (looked up); unlike it, the position
tables keep their two first rows here.
"""

from _common_b import arrays, dense, embed, finish, from_heads, layers, nest, norm, put, to_heads

MANNER = "own"
ARCHITECTURE = "bart"
NOTES = (
    "a flat root (encoder_layers, decoder_layers lists; bare arrays for positions); q_proj kernels (d, heads, head_dim), the "
    "output projection of an attention is called ff (heads, head_dim, d), the MLP ff0/ff1; cross_attn; no final_logits_bias"
)
HEADS = 4


def torch_side():
    from transformers import BartConfig, BartForConditionalGeneration

    return arrays(
        BartForConditionalGeneration(
            BartConfig(
                vocab_size=90,
                d_model=64,
                encoder_layers=3,
                decoder_layers=3,
                encoder_attention_heads=HEADS,
                decoder_attention_heads=HEADS,
                encoder_ffn_dim=256,
                decoder_ffn_dim=256,
                max_position_embeddings=22,
            )
        ),
        TIES,
    )


def attention(t, p):
    return nest(
        q_proj=to_heads(t, p + "q_proj", HEADS),
        k_proj=to_heads(t, p + "k_proj", HEADS),
        v_proj=to_heads(t, p + "v_proj", HEADS),
        ff=from_heads(t, p + "out_proj", HEADS),
    )


def layer(t, p):
    out = nest(
        self_attn=attention(t, p + "self_attn."),
        self_attn_layer_norm=norm(t, p + "self_attn_layer_norm"),
        ff0=dense(t, p + "fc1"),
        ff1=dense(t, p + "fc2"),
        final_layer_norm=norm(t, p + "final_layer_norm"),
    )
    if p + "encoder_attn.q_proj.weight" in t:
        out.update(
            nest(
                cross_attn=attention(t, p + "encoder_attn."),
                cross_attn_layer_norm=norm(t, p + "encoder_attn_layer_norm"),
            )
        )
    return out


def flax_side(t):
    out = {}
    put(out, "embedding", embed(t, "model.shared"))
    for side in ("encoder", "decoder"):
        p = f"model.{side}."
        out[f"{side}_embed_positions"] = t[p + "embed_positions.weight"]
        put(out, f"{side}_embed_layer_norm", norm(t, p + "layernorm_embedding"))
        for i in range(layers(t, p + "layers.")):
            put(out, f"{side}_layers/{i}", layer(t, f"{p}layers.{i}."))
    return finish(out)


LEFT = ("final_logits_bias",)
EXTRA = ()
TIES = {
    n: "model.shared.weight"
    for n in (
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
        "lm_head.weight",
    )
}
