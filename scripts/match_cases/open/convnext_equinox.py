"""ConvNeXt as paganpasta/eqxvision keeps it (Equinox, after torchvision). Source: eqxvision/models/classification/convnext.py
(looked up); the fields of its ConvNormActivation and Linear2d from memory.
"""

from _common_b import arrays, finish, layers, nest, plain, put

MANNER = "equinox"
ARCHITECTURE = "convnext"
NOTES = (
    "nn.Sequential everywhere, so layers.N at every level; convolutions as torch's but their bias (c, 1, 1); layer_scale "
    "(c, 1, 1), declared before the block; linears (out, in); leaves in declared order"
)


def torch_side():
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return arrays(
        ConvNextForImageClassification(
            ConvNextConfig(hidden_sizes=[16, 32, 64, 128], depths=[2, 2, 2, 2], num_labels=9)
        )
    )


def conv(t, p):
    return {"weight": t[p + ".weight"], "bias": t[p + ".bias"][:, None, None]}


def sequential(**parts):
    return nest(layers={k[1:]: v for k, v in nest(**parts).items()})


def block(t, p):
    return {
        "layer_scale": t[p + "layer_scale_parameter"][:, None, None],
        **nest(
            block=sequential(
                _0=conv(t, p + "dwconv"),
                _1=plain(t, p + "layernorm"),
                _2=plain(t, p + "pwconv1"),
                _4=plain(t, p + "pwconv2"),
            )
        ),
    }


def flax_side(t):
    e = "convnext.embeddings."
    parts = {"_0": sequential(_0=conv(t, e + "patch_embeddings"), _1=plain(t, e + "layernorm"))}
    for s in range(4):
        p = f"convnext.encoder.stages.{s}."
        if s:
            parts[f"_{2 * s}"] = sequential(
                _0=plain(t, p + "downsampling_layer.0"), _1=conv(t, p + "downsampling_layer.1")
            )
        n = layers(t, p + "layers.")
        parts[f"_{2 * s + 1}"] = sequential(
            **{f"_{i}": block(t, f"{p}layers.{i}.") for i in range(n)}
        )
    out = {}
    put(out, "features", sequential(**parts))
    put(out, "classifier", sequential(_0=plain(t, "convnext.layernorm"), _2=plain(t, "classifier")))
    return finish(out, "eqx")


LEFT = ()
EXTRA = ()
TIES = {}
