"""ViT as transformers 4's FlaxViTForImageClassification. Source: modeling_flax_vit.py (looked up)."""

from _common_b import arrays, conv, dense, finish, layers, nest, norm, put

MANNER = "hf_flax"
ARCHITECTURE = "vit"
NOTES = (
    "the old names (encoder.layer.N.attention.attention.query, attention.output.dense, intermediate.dense, output.dense) "
    "against transformers 5's new ones (layers.N.attention.q_proj, o_proj, mlp.fc1, mlp.fc2); fused heads stay 2-D"
)
OLD = {
    "attention/attention/query": "attention.q_proj",
    "attention/attention/key": "attention.k_proj",
    "attention/attention/value": "attention.v_proj",
    "attention/output/dense": "attention.o_proj",
    "intermediate/dense": "mlp.fc1",
    "output/dense": "mlp.fc2",
}


def torch_side():
    from transformers import ViTConfig, ViTForImageClassification

    return arrays(
        ViTForImageClassification(
            ViTConfig(
                hidden_size=32,
                num_hidden_layers=4,
                num_attention_heads=2,
                intermediate_size=128,
                image_size=48,
                patch_size=16,
                num_labels=6,
            )
        )
    )


def flax_side(t):
    out = {
        "vit/embeddings/cls_token": t["vit.embeddings.cls_token"],
        "vit/embeddings/position_embeddings": t["vit.embeddings.position_embeddings"],
    }
    put(
        out,
        "vit/embeddings/patch_embeddings/projection",
        conv(t, "vit.embeddings.patch_embeddings.projection"),
    )
    for i in range(layers(t, "vit.layers.")):
        p, q = f"vit.layers.{i}.", f"vit/encoder/layer/{i}"
        for new, old in OLD.items():
            put(out, f"{q}/{new}", dense(t, p + old))
        put(
            out,
            q,
            nest(
                layernorm_before=norm(t, p + "layernorm_before"),
                layernorm_after=norm(t, p + "layernorm_after"),
            ),
        )
    put(out, "vit/layernorm", norm(t, "vit.layernorm"))
    put(out, "classifier", dense(t, "classifier"))
    return finish(out)


LEFT = ()
EXTRA = ()
TIES = {}
