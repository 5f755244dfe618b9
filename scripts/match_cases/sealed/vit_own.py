"""ViT as paganpasta/eqxvision keeps it (Equinox, after DINO). Source: eqxvision/models/classification/vit.py (looked up),
the fields of its PatchEmbed and MlpProjection from memory.
"""
import numpy as np
from _common_b import arrays, finish, layers, nest, plain, put

MANNER = "own"
ARCHITECTURE = "vit"
NOTES = ("Equinox: weights (out, in), a convolution's bias (out, 1, 1); packed qkv (3*d, d); class token (1, d) and positions "
         "(n, d) without the batch axis; leaves in the order of the fields. Torch names are those that save_pretrained of "
         "transformers 5 writes for ViT: the old ones (vit.encoder.layer.N.attention.attention.query ...), not the module's")


def torch_side():
    from transformers import ViTConfig, ViTForImageClassification
    return arrays(ViTForImageClassification(ViTConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=6, intermediate_size=192,
        image_size=24, patch_size=8, num_labels=7)), saved=True)


def block(t, p):
    qkv = [p + "attention.attention." + n for n in ("query", "key", "value")]
    return nest(
        norm1=plain(t, p + "layernorm_before"),
        attn=nest(qkv={"weight": np.concatenate([t[n + ".weight"] for n in qkv]),
                       "bias": np.concatenate([t[n + ".bias"] for n in qkv])},
                  proj=plain(t, p + "attention.output.dense")),
        norm2=plain(t, p + "layernorm_after"),
        mlp=nest(fc1=plain(t, p + "intermediate.dense"), fc2=plain(t, p + "output.dense")))


def flax_side(t):
    out = {"cls_token": t["vit.embeddings.cls_token"][0], "pos_embed": t["vit.embeddings.position_embeddings"][0]}
    patch = "vit.embeddings.patch_embeddings.projection."
    put(out, "patch_embed/proj", {"weight": t[patch + "weight"], "bias": t[patch + "bias"][:, None, None]})
    for i in range(layers(t, "vit.encoder.layer.")):
        put(out, f"blocks/{i}", block(t, f"vit.encoder.layer.{i}."))
    put(out, "norm", plain(t, "vit.layernorm"))
    put(out, "fc", plain(t, "classifier"))
    return finish(out, "eqx")


LEFT = ()
EXTRA = ()
TIES = {}
