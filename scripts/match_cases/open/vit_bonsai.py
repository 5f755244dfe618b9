"""ViT as jax-ml/bonsai keeps it in NNX. Source: bonsai/models/vit/modeling.py and params.py (looked up)."""

from _common_b import arrays, conv, dense, finish, layers, mhdpa, nest, norm, put

MANNER = "bonsai"
ARCHITECTURE = "vit"
NOTES = (
    "the embedding module is itself called pos_embeddings (and holds cls_token and projection); nnx.MultiHeadAttention with "
    "heads split off; linear1/linear2; a list of layers"
)
HEADS = 4


def torch_side():
    from transformers import ViTConfig, ViTForImageClassification

    return arrays(
        ViTForImageClassification(
            ViTConfig(
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=HEADS,
                intermediate_size=256,
                image_size=32,
                patch_size=8,
                num_labels=12,
            )
        )
    )


def layer(t, p):
    return nest(
        attention=mhdpa(t, p + "attention.", HEADS, o="o_proj"),
        layernorm_before=norm(t, p + "layernorm_before"),
        layernorm_after=norm(t, p + "layernorm_after"),
        linear1=dense(t, p + "mlp.fc1"),
        linear2=dense(t, p + "mlp.fc2"),
    )


def flax_side(t):
    out = {
        "pos_embeddings/cls_token": t["vit.embeddings.cls_token"],
        "pos_embeddings/pos_embeddings": t["vit.embeddings.position_embeddings"],
    }
    put(out, "pos_embeddings/projection", conv(t, "vit.embeddings.patch_embeddings.projection"))
    for i in range(layers(t, "vit.layers.")):
        put(out, f"layers/{i}", layer(t, f"vit.layers.{i}."))
    put(out, "ln", norm(t, "vit.layernorm"))
    put(out, "classifier", dense(t, "classifier"))
    return finish(out, "nnx")


LEFT = ()
EXTRA = ()
TIES = {}
