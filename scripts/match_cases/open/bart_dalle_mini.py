"""BART as borisdayma/dalle-mini keeps its scanned BART (post-norm, without GLU). Source: dalle_mini/model/modeling.py and a published
listing of its parameters (looked up); the shared table is the case's (dalle-mini has one per side).
"""

from _common_b import arrays, dense, embed, finish, layers, nest, norm, put, stack

MANNER = "dalle_mini"
ARCHITECTURE = "bart"
NOTES = (
    "scanned, leading axis, under layers.FlaxBartEncoderLayers / FlaxBartDecoderLayers; automatic names: FlaxBartAttention_0 "
    "(self) and _1 (cross), LayerNorm_0.., FFN_0.Dense_0/1; final_logits_bias not held. Torch side as save_pretrained writes it: "
    "without the tied tables and head"
)


def torch_side():
    from transformers import BartConfig, BartForConditionalGeneration

    return arrays(
        BartForConditionalGeneration(
            BartConfig(
                vocab_size=107,
                d_model=48,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=3,
                decoder_attention_heads=3,
                encoder_ffn_dim=192,
                decoder_ffn_dim=192,
                max_position_embeddings=24,
            )
        ),
        saved=True,
    )


def layer(t, p):
    kinds = [a for a in ("self_attn", "encoder_attn") if f"{p}{a}.q_proj.weight" in t]
    out = nest(FFN_0=nest(Dense_0=dense(t, p + "fc1"), Dense_1=dense(t, p + "fc2")))
    for j, a in enumerate(kinds):
        for n in ("q_proj", "k_proj", "v_proj", "out_proj"):
            put(out, f"FlaxBartAttention_{j}/{n}", dense(t, f"{p}{a}.{n}"))
        put(out, f"LayerNorm_{j}", norm(t, f"{p}{a}_layer_norm"))
    put(out, f"LayerNorm_{len(kinds)}", norm(t, p + "final_layer_norm"))
    return out


def flax_side(t):
    out = {}
    put(out, "model/shared", embed(t, "model.shared"))
    for side in ("encoder", "decoder"):
        p = f"model.{side}."
        n = layers(t, p + "layers.")
        put(
            out,
            f"model/{side}/layers/FlaxBart{side.capitalize()}Layers",
            stack([layer(t, f"{p}layers.{i}.") for i in range(n)]),
        )
        put(
            out,
            f"model/{side}",
            nest(
                embed_positions=embed(t, p + "embed_positions"),
                layernorm_embedding=norm(t, p + "layernorm_embedding"),
            ),
        )
    return finish(out)


LEFT = ("final_logits_bias",)
EXTRA = ()
TIES = {}
