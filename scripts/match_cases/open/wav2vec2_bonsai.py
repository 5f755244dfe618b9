"""Wav2Vec 2.0 (base) in NNX, in bonsai's manner, with the dropouts' random state in the checkpoint. Source: from memory; bonsai has
no Wav2Vec 2.0.
"""

import numpy as np
from _common_b import arrays, conv, dense, finish, layers, nest, norm, put

MANNER = "bonsai"
ARCHITECTURE = "wav2vec2"
NOTES = (
    "the 'base' kind: group norm after the first convolution only, no convolution biases; the positional convolution's direction "
    "transposed as a Flax kernel, kernel_v (k, in/groups, out), its length kernel_g (k, 1, 1) from torch's (1, 1, k); random "
    "state of nnx.Dropout (count, key) in every layer; masked_spec_embed not held"
)
LAYERS = 3


def torch_side():
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    return arrays(
        Wav2Vec2Model(
            Wav2Vec2Config(
                hidden_size=48,
                num_hidden_layers=LAYERS,
                num_attention_heads=6,
                intermediate_size=192,
                conv_dim=(32,) * 5,
                conv_kernel=(10, 3, 3, 2, 2),
                conv_stride=(5, 2, 2, 2, 2),
                num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=4,
            )
        )
    )


def layer(t, p):
    return nest(
        attn=nest(
            q_proj=dense(t, p + "attention.q_proj"),
            k_proj=dense(t, p + "attention.k_proj"),
            v_proj=dense(t, p + "attention.v_proj"),
            o_proj=dense(t, p + "attention.out_proj"),
        ),
        attn_norm=norm(t, p + "layer_norm"),
        mlp=nest(
            fc1=dense(t, p + "feed_forward.intermediate_dense"),
            fc2=dense(t, p + "feed_forward.output_dense"),
        ),
        final_norm=norm(t, p + "final_layer_norm"),
    )


def flax_side(t):
    c = "encoder.pos_conv_embed.conv."
    out = {
        "encoder/pos_conv/bias": t[c + "bias"],
        "encoder/pos_conv/kernel_g": t[c + "parametrizations.weight.original0"].transpose(2, 1, 0),
        "encoder/pos_conv/kernel_v": t[c + "parametrizations.weight.original1"].transpose(2, 1, 0),
    }
    for i in range(layers(t, "feature_extractor.conv_layers.")):
        put(
            out,
            f"feature_extractor/conv_layers/{i}/conv",
            conv(t, f"feature_extractor.conv_layers.{i}.conv"),
        )
    put(
        out,
        "feature_extractor/conv_layers/0/group_norm",
        norm(t, "feature_extractor.conv_layers.0.layer_norm"),
    )
    put(
        out,
        "feature_projection",
        nest(
            norm=norm(t, "feature_projection.layer_norm"),
            linear=dense(t, "feature_projection.projection"),
        ),
    )
    put(out, "encoder/norm", norm(t, "encoder.layer_norm"))
    for i in range(LAYERS):
        put(out, f"encoder/layers/{i}", layer(t, f"encoder.layers.{i}."))
        out[f"encoder/layers/{i}/dropout/rngs/count"] = np.array(0, np.uint32)
        out[f"encoder/layers/{i}/dropout/rngs/key"] = np.array([0, i + 1], np.uint32)
    return finish(out, "nnx")


LEFT = ("masked_spec_embed",)
EXTRA = tuple(
    f"encoder.layers.{i}.dropout.rngs.{n}" for i in range(LAYERS) for n in ("count", "key")
)
TIES = {}
