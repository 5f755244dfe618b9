"""Wav2Vec 2.0 as sanchit-gandhi/seq2seq-speech keeps it: scanned, matmuls fused. Source: models/modeling_flax_wav2vec2.py (looked up)."""
import numpy as np
from _common_b import arrays, conv, dense, finish, layers, nest, norm, put, stack

MANNER = "linen_scan"
ARCHITECTURE = "wav2vec2"
NOTES = ("encoder layers stacked on a leading axis under layers.FlaxWav2Vec2EncoderLayers; fused_proj kernel (layers, d, 3*d), query, "
         "key, value side by side; convolution layers not scanned; weight_v/weight_g as torch's")


def torch_side():
    from transformers import Wav2Vec2Config, Wav2Vec2Model
    return arrays(Wav2Vec2Model(Wav2Vec2Config(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, conv_dim=(48,) * 3,
        conv_kernel=(10, 3, 2), conv_stride=(5, 2, 2), num_conv_pos_embeddings=12, num_conv_pos_embedding_groups=8,
        feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)))


def layer(t, p):
    qkv = [dense(t, f"{p}attention.{n}_proj") for n in "qkv"]
    return nest(
        attention=nest(fused_proj={k: np.concatenate([d[k] for d in qkv], -1) for k in ("kernel", "bias")},
                       out_proj=dense(t, p + "attention.out_proj")),
        layer_norm=norm(t, p + "layer_norm"), final_layer_norm=norm(t, p + "final_layer_norm"),
        feed_forward=nest(intermediate_dense=dense(t, p + "feed_forward.intermediate_dense"),
                          output_dense=dense(t, p + "feed_forward.output_dense")))


def flax_side(t):
    c = "encoder.pos_conv_embed.conv."
    out = {"masked_spec_embed": t["masked_spec_embed"],
           "encoder/pos_conv_embed/conv/bias": t[c + "bias"],
           "encoder/pos_conv_embed/conv/weight_g": t[c + "parametrizations.weight.original0"],
           "encoder/pos_conv_embed/conv/weight_v": t[c + "parametrizations.weight.original1"]}
    for i in range(layers(t, "feature_extractor.conv_layers.")):
        p = f"feature_extractor.conv_layers.{i}."
        put(out, f"feature_extractor/conv_layers/{i}", nest(conv=conv(t, p + "conv"), layer_norm=norm(t, p + "layer_norm")))
    put(out, "feature_projection", nest(layer_norm=norm(t, "feature_projection.layer_norm"),
                                        projection=dense(t, "feature_projection.projection")))
    n = layers(t, "encoder.layers.")
    put(out, "encoder", nest(layer_norm=norm(t, "encoder.layer_norm"), layers=nest(
        FlaxWav2Vec2EncoderLayers=stack([layer(t, f"encoder.layers.{i}.") for i in range(n)]))))
    return finish(out)


LEFT = ()
EXTRA = ()
TIES = {}
