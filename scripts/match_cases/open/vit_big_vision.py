"""ViT as google-research/vision_transformer and the published big_vision/AugReg .npz files keep it.

Source: big_vision/models/vit.py (looked up; its comments on old checkpoints), the auto names of the old blocks from memory.
"""

from _common_b import arrays, conv, dense, finish, layers, mhdpa, nest, norm, put

MANNER = "big_vision"
ARCHITECTURE = "vit"
NOTES = (
    "per-layer blocks encoderblock_N with auto names numbered across classes (LayerNorm_0, MultiHeadDotProductAttention_1, "
    "LayerNorm_2, MlpBlock_3), heads split off, position table with the class token's row, under Transformer/posembed_input"
)
HEADS = 3


def torch_side():
    from transformers import ViTConfig, ViTForImageClassification

    return arrays(
        ViTForImageClassification(
            ViTConfig(
                hidden_size=48,
                num_hidden_layers=3,
                num_attention_heads=HEADS,
                intermediate_size=192,
                image_size=32,
                patch_size=8,
                num_labels=10,
            )
        )
    )


def block(t, p):
    return nest(
        LayerNorm_0=norm(t, p + "layernorm_before"),
        MultiHeadDotProductAttention_1=mhdpa(t, p + "attention.", HEADS, o="o_proj"),
        LayerNorm_2=norm(t, p + "layernorm_after"),
        MlpBlock_3=nest(Dense_0=dense(t, p + "mlp.fc1"), Dense_1=dense(t, p + "mlp.fc2")),
    )


def flax_side(t):
    out = {
        "cls": t["vit.embeddings.cls_token"],
        "Transformer/posembed_input/pos_embedding": t["vit.embeddings.position_embeddings"],
    }
    put(out, "embedding", conv(t, "vit.embeddings.patch_embeddings.projection"))
    for i in range(layers(t, "vit.layers.")):
        put(out, f"Transformer/encoderblock_{i}", block(t, f"vit.layers.{i}."))
    put(out, "Transformer/encoder_norm", norm(t, "vit.layernorm"))
    put(out, "head", dense(t, "classifier"))
    return finish(out)


LEFT = ()
EXTRA = ()
TIES = {}
