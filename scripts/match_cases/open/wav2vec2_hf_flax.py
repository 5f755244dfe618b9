"""Wav2Vec 2.0 as transformers 4's FlaxWav2Vec2Model. Source: modeling_flax_wav2vec2.py (looked up)."""

from _common_b import arrays, conv, dense, finish, layers, norm, put

MANNER = "hf_flax"
ARCHITECTURE = "wav2vec2"
NOTES = (
    "the 'large' kind (layer norm after every convolution, biases, stable layer norm), the only one Flax had; the positional "
    "convolution keeps weight_v as torch's (out, in, k) and weight_g (1, 1, k), against parametrizations.weight.original0/1"
)


def torch_side():
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    return arrays(
        Wav2Vec2Model(
            Wav2Vec2Config(
                hidden_size=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=192,
                conv_dim=(32,) * 4,
                conv_kernel=(10, 3, 3, 2),
                conv_stride=(5, 2, 2, 2),
                num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=4,
                feat_extract_norm="layer",
                do_stable_layer_norm=True,
                conv_bias=True,
            )
        )
    )


def flax_side(t):
    c, w = "encoder.pos_conv_embed.conv.", "encoder.pos_conv_embed.conv.parametrizations.weight."
    out = {
        "masked_spec_embed": t["masked_spec_embed"],
        "encoder/pos_conv_embed/conv/weight_g": t[w + "original0"],
        "encoder/pos_conv_embed/conv/weight_v": t[w + "original1"],
        "encoder/pos_conv_embed/conv/bias": t[c + "bias"],
    }
    for i in range(layers(t, "feature_extractor.conv_layers.")):
        p = f"feature_extractor.conv_layers.{i}."
        put(out, p.replace(".", "/") + "conv", conv(t, p + "conv"))
        put(out, p.replace(".", "/") + "layer_norm", norm(t, p + "layer_norm"))
    put(out, "feature_projection/layer_norm", norm(t, "feature_projection.layer_norm"))
    put(out, "feature_projection/projection", dense(t, "feature_projection.projection"))
    put(out, "encoder/layer_norm", norm(t, "encoder.layer_norm"))
    for i in range(layers(t, "encoder.layers.")):
        p = f"encoder.layers.{i}."
        for n in (
            "attention.q_proj",
            "attention.k_proj",
            "attention.v_proj",
            "attention.out_proj",
            "feed_forward.intermediate_dense",
            "feed_forward.output_dense",
        ):
            put(out, (p + n).replace(".", "/"), dense(t, p + n))
        for n in ("layer_norm", "final_layer_norm"):
            put(out, (p + n).replace(".", "/"), norm(t, p + n))
    return finish(out)


LEFT = ()
EXTRA = ()
TIES = {}
