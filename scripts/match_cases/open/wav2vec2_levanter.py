"""Wav2Vec 2.0 (base) in levanter's manner. Source: levanter/models/whisper.py, haliax/nn/conv.py (looked up); levanter has no
Wav2Vec 2.0, so its fields are written as that author would.
"""

from _common_b import (
    arrays,
    dense,
    finish,
    from_heads,
    hax,
    layers,
    nest,
    norm,
    plain,
    put,
    stack,
    to_heads,
)

MANNER = "levanter"
ARCHITECTURE = "wav2vec2"
NOTES = (
    "layers.stacked on axis 0, out_first=False: (layers, embed, heads, head_size), (layers, embed, mlp), all called weight; "
    "convolutions as torch's, in a list; the positional convolution as it is saved (weight_g, weight_v); fields in declared order"
)
HEADS = 4


def torch_side():
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    return arrays(
        Wav2Vec2Model(
            Wav2Vec2Config(
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=HEADS,
                intermediate_size=256,
                conv_dim=(40,) * 4,
                conv_kernel=(10, 3, 3, 2),
                conv_stride=(5, 2, 2, 2),
                num_conv_pos_embeddings=8,
                num_conv_pos_embedding_groups=4,
            )
        )
    )


def layer(t, p):
    a = p + "attention."
    return hax(
        nest(
            self_attn=nest(
                q_proj=to_heads(t, a + "q_proj", HEADS),
                k_proj=to_heads(t, a + "k_proj", HEADS),
                v_proj=to_heads(t, a + "v_proj", HEADS),
                out_proj=from_heads(t, a + "out_proj", HEADS),
            ),
            attn_ln=norm(t, p + "layer_norm"),
            mlp=nest(
                up_proj=dense(t, p + "feed_forward.intermediate_dense"),
                down_proj=dense(t, p + "feed_forward.output_dense"),
            ),
            mlp_ln=norm(t, p + "final_layer_norm"),
        )
    )


def flax_side(t):
    c = "encoder.pos_conv_embed.conv."
    out = {}
    for i in range(layers(t, "feature_extractor.conv_layers.")):
        p = f"feature_extractor.conv_layers.{i}."
        put(out, f"feature_extractor/blocks/{i}/conv", plain(t, p + "conv"))
        if not i:
            put(out, f"feature_extractor/blocks/{i}/group_norm", plain(t, p + "layer_norm"))
    put(
        out,
        "feature_projection",
        hax(
            nest(
                ln=norm(t, "feature_projection.layer_norm"),
                proj=dense(t, "feature_projection.projection"),
            )
        ),
    )
    out["masked_embed"] = t["masked_spec_embed"]
    out["encoder/pos_conv/weight_g"] = t[c + "parametrizations.weight.original0"]
    out["encoder/pos_conv/weight_v"] = t[c + "parametrizations.weight.original1"]
    out["encoder/pos_conv/bias"] = t[c + "bias"]
    n = layers(t, "encoder.layers.")
    put(
        out,
        "encoder/transformer/layers/stacked",
        stack([layer(t, f"encoder.layers.{i}.") for i in range(n)]),
    )
    put(out, "encoder/ln", plain(t, "encoder.layer_norm"))
    return finish(out, "eqx")


LEFT = ()
EXTRA = ()
TIES = {}
