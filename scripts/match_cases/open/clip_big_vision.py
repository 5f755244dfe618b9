"""CLIP in big_vision's two_towers, with scan. Source: big_vision/models/proj/image_text/two_towers.py, text_transformer.py,
vit.py (looked up); the pre-norm and the class token's row of the position table, which its own models lack, in its manner.
"""

from _common_b import arrays, conv, dense, embed, finish, layers, mhdpa, nest, norm, put, stack

MANNER = "big_vision"
ARCHITECTURE = "clip"
NOTES = (
    "img/txt towers, encoderblock stacked on axis 0, auto names; the text tower's encoder is Encoder_0 and its table Embed_0; "
    "t has shape (1,) where torch has a scalar; heads without bias; positions (1, n, d); cls (1, 1, d) from (d,)"
)
HEADS = 4


def torch_side():
    from transformers import CLIPConfig, CLIPModel

    return arrays(
        CLIPModel(
            CLIPConfig(
                text_config=dict(
                    hidden_size=48,
                    num_hidden_layers=4,
                    num_attention_heads=HEADS,
                    intermediate_size=192,
                    vocab_size=120,
                    max_position_embeddings=16,
                    bos_token_id=0,
                    eos_token_id=1,
                ),
                vision_config=dict(
                    hidden_size=48,
                    num_hidden_layers=4,
                    num_attention_heads=HEADS,
                    intermediate_size=192,
                    image_size=40,
                    patch_size=10,
                ),
                projection_dim=48,
            )
        )
    )


def encoder(t, tower, last):
    def block(p):
        return nest(
            LayerNorm_0=norm(t, p + "layer_norm1"),
            MultiHeadDotProductAttention_0=mhdpa(t, p + "self_attn.", HEADS),
            LayerNorm_1=norm(t, p + "layer_norm2"),
            MlpBlock_0=nest(Dense_0=dense(t, p + "mlp.fc1"), Dense_1=dense(t, p + "mlp.fc2")),
        )

    p = f"{tower}.encoder.layers."
    return nest(
        encoderblock=stack([block(f"{p}{i}.") for i in range(layers(t, p))]),
        encoder_norm=norm(t, f"{tower}.{last}"),
    )


def flax_side(t):
    v, x = "vision_model.", "text_model."
    out = {
        "t": t["logit_scale"].reshape(1),
        "img/cls": t[v + "embeddings.class_embedding"][None, None],
        "img/pos_embedding": t[v + "embeddings.position_embedding.weight"][None],
        "txt/pos_embedding": t[x + "embeddings.position_embedding.weight"][None],
    }
    put(
        out,
        "img",
        nest(
            embedding=conv(t, v + "embeddings.patch_embedding"),
            pre_norm=norm(t, v + "pre_layrnorm"),
            Transformer=encoder(t, "vision_model", "post_layernorm"),
            head=dense(t, "visual_projection"),
        ),
    )
    put(
        out,
        "txt",
        nest(
            Embed_0=embed(t, x + "embeddings.token_embedding"),
            Encoder_0=encoder(t, "text_model", "final_layer_norm"),
            head=dense(t, "text_projection"),
        ),
    )
    return finish(out)


LEFT = ()
EXTRA = ()
TIES = {}
