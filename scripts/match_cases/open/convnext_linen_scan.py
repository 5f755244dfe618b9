"""ConvNeXt in plain Linen with nn.scan over the blocks of each stage. Source: flax's own naming, from memory."""

from _common_b import arrays, conv, dense, finish, layers, nest, norm, put, stack

MANNER = "linen_scan"
ARCHITECTURE = "convnext"
NOTES = (
    "each stage's blocks stacked on a leading axis, one stage of a single block (leading axis 1); automatic names; depthwise "
    "kernels (depth, 7, 7, 1, c); gamma a bare param"
)


def torch_side():
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return arrays(
        ConvNextForImageClassification(
            ConvNextConfig(hidden_sizes=[10, 20, 40, 80], depths=[2, 1, 4, 2], num_labels=6)
        )
    )


def block(t, p):
    return {
        "gamma": t[p + "layer_scale_parameter"],
        **nest(
            Conv_0=conv(t, p + "dwconv"),
            LayerNorm_0=norm(t, p + "layernorm"),
            Dense_0=dense(t, p + "pwconv1"),
            Dense_1=dense(t, p + "pwconv2"),
        ),
    }


def flax_side(t):
    e = "convnext.embeddings."
    out = {}
    put(
        out,
        "params/Stem_0",
        nest(Conv_0=conv(t, e + "patch_embeddings"), LayerNorm_0=norm(t, e + "layernorm")),
    )
    for s in range(4):
        p = f"convnext.encoder.stages.{s}."
        if s:
            put(
                out,
                f"params/Downsample_{s - 1}",
                nest(
                    LayerNorm_0=norm(t, p + "downsampling_layer.0"),
                    Conv_0=conv(t, p + "downsampling_layer.1"),
                ),
            )
        n = layers(t, p + "layers.")
        put(
            out,
            f"params/ScanConvNeXtBlock_{s}",
            stack([block(t, f"{p}layers.{i}.") for i in range(n)]),
        )
    put(
        out,
        "params",
        nest(LayerNorm_0=norm(t, "convnext.layernorm"), Dense_0=dense(t, "classifier")),
    )
    return finish(out)


LEFT = ()
EXTRA = ()
TIES = {}
