"""ConvNeXt as jax-ml/bonsai keeps it in NNX. Source: bonsai/models/convnext/modeling.py and params.py (looked up)."""

from _common_b import arrays, conv, dense, finish, layers, nest, norm, put

MANNER = "bonsai"
ARCHITECTURE = "convnext"
NOTES = (
    "lists of stages, of downsample_layers and of layers; the layer scale is gamma; depthwise kernels (7, 7, 1, c); the stem an "
    "nnx.Sequential, embedding_layer.layers.0/1"
)


def torch_side():
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return arrays(
        ConvNextForImageClassification(
            ConvNextConfig(hidden_sizes=[12, 24, 48, 96], depths=[2, 2, 3, 2], num_labels=10)
        )
    )


def block(t, p):
    return {
        **nest(
            dwconv=conv(t, p + "dwconv"),
            norm=norm(t, p + "layernorm"),
            pwconv1=dense(t, p + "pwconv1"),
            pwconv2=dense(t, p + "pwconv2"),
        ),
        "gamma": t[p + "layer_scale_parameter"],
    }


def flax_side(t):
    out = {}
    put(out, "embedding_layer/layers/0", conv(t, "convnext.embeddings.patch_embeddings"))
    put(out, "embedding_layer/layers/1", norm(t, "convnext.embeddings.layernorm"))
    for s in range(4):
        p = f"convnext.encoder.stages.{s}."
        if s:
            put(out, f"stages/{s}/downsample_layers/0", norm(t, p + "downsampling_layer.0"))
            put(out, f"stages/{s}/downsample_layers/1", conv(t, p + "downsampling_layer.1"))
        for i in range(layers(t, p + "layers.")):
            put(out, f"stages/{s}/layers/{i}", block(t, f"{p}layers.{i}."))
    put(out, "norm", norm(t, "convnext.layernorm"))
    put(out, "head", dense(t, "classifier"))
    return finish(out, "nnx")


LEFT = ()
EXTRA = ()
TIES = {}
