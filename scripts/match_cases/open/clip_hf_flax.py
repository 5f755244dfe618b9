"""CLIP as transformers 4's FlaxCLIPModel. Source: modeling_flax_clip.py (looked up)."""

from _common_b import arrays, conv, dense, embed, finish, layers, nest, norm, put

MANNER = "hf_flax"
ARCHITECTURE = "clip"
NOTES = (
    "both towers; near-torch names with kernel/scale/embedding, q/k/v/out 2-D; patch convolution without bias; the "
    "misspelt pre_layrnorm kept; logit_scale a scalar; class_embedding (d,)"
)


def torch_side():
    from transformers import CLIPConfig, CLIPModel

    return arrays(
        CLIPModel(
            CLIPConfig(
                text_config=dict(
                    hidden_size=32,
                    num_hidden_layers=3,
                    num_attention_heads=4,
                    intermediate_size=128,
                    vocab_size=99,
                    max_position_embeddings=20,
                    bos_token_id=0,
                    eos_token_id=1,
                ),
                vision_config=dict(
                    hidden_size=48,
                    num_hidden_layers=3,
                    num_attention_heads=3,
                    intermediate_size=192,
                    image_size=32,
                    patch_size=8,
                ),
                projection_dim=32,
            )
        )
    )


def block(t, p):
    return nest(
        self_attn=nest(
            **{
                n: dense(t, p + "self_attn." + n)
                for n in ("q_proj", "k_proj", "v_proj", "out_proj")
            }
        ),
        layer_norm1=norm(t, p + "layer_norm1"),
        layer_norm2=norm(t, p + "layer_norm2"),
        mlp=nest(fc1=dense(t, p + "mlp.fc1"), fc2=dense(t, p + "mlp.fc2")),
    )


def flax_side(t):
    out = {
        "logit_scale": t["logit_scale"],
        "vision_model/embeddings/class_embedding": t["vision_model.embeddings.class_embedding"],
    }
    for tower in ("text_model", "vision_model"):
        for i in range(layers(t, f"{tower}.encoder.layers.")):
            put(out, f"{tower}/encoder/layers/{i}", block(t, f"{tower}.encoder.layers.{i}."))
    put(
        out,
        "text_model/embeddings",
        nest(
            token_embedding=embed(t, "text_model.embeddings.token_embedding"),
            position_embedding=embed(t, "text_model.embeddings.position_embedding"),
        ),
    )
    put(out, "text_model/final_layer_norm", norm(t, "text_model.final_layer_norm"))
    put(
        out,
        "vision_model/embeddings",
        nest(
            patch_embedding=conv(t, "vision_model.embeddings.patch_embedding"),
            position_embedding=embed(t, "vision_model.embeddings.position_embedding"),
        ),
    )
    for n in ("pre_layrnorm", "post_layernorm"):
        put(out, f"vision_model/{n}", norm(t, f"vision_model.{n}"))
    put(out, "visual_projection", dense(t, "visual_projection"))
    put(out, "text_projection", dense(t, "text_projection"))
    return finish(out)


LEFT = ()
EXTRA = ()
TIES = {}
