"""ConvNeXt in Linen after torchvision's numbering, as the small library `limo` keeps it (looked up as text; its repository unknown)."""
from _common_b import arrays, conv, dense, finish, layers, nest, norm, put

MANNER = "own"
ARCHITECTURE = "convnext"
NOTES = ("module names that contain dots: features.0.0 (stem), features.1.j (blocks), features.2.0/2.1 (downsampling) ...: stage s is "
         "features.(2s+1); inside a block block.0 (depthwise), block.2 (norm), block.3, block.5, layer_scale; classifier.0, classifier.2")


def torch_side():
    from transformers import ConvNextConfig, ConvNextForImageClassification
    return arrays(ConvNextForImageClassification(ConvNextConfig(
        hidden_sizes=[8, 16, 32, 64], depths=[3, 2, 4, 2], num_labels=12)))


def block(t, p):
    out = {"layer_scale": t[p + "layer_scale_parameter"]}
    put(out, "block.0", conv(t, p + "dwconv"))
    put(out, "block.2", norm(t, p + "layernorm"))
    put(out, "block.3", dense(t, p + "pwconv1"))
    put(out, "block.5", dense(t, p + "pwconv2"))
    return out


def flax_side(t):
    out = {}
    put(out, "params/features.0.0", conv(t, "convnext.embeddings.patch_embeddings"))
    put(out, "params/features.0.1", norm(t, "convnext.embeddings.layernorm"))
    for s in range(4):
        p = f"convnext.encoder.stages.{s}."
        if s:
            put(out, f"params/features.{2 * s}.0", norm(t, p + "downsampling_layer.0"))
            put(out, f"params/features.{2 * s}.1", conv(t, p + "downsampling_layer.1"))
        for i in range(layers(t, p + "layers.")):
            put(out, f"params/features.{2 * s + 1}.{i}", block(t, f"{p}layers.{i}."))
    put(out, "params/classifier.0", norm(t, "convnext.layernorm"))
    put(out, "params/classifier.2", dense(t, "classifier"))
    return finish(out)


LEFT = ()
EXTRA = ()
TIES = {}
