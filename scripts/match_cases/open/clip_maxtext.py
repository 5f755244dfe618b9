"""CLIP in MaxText's manner. Source: MaxText/layers/gpt3.py (fused qkv, norms with bias) and llama4.py (unfold linear,
vit_encoder_layer_mlp_fc1), looked up; layernorm_pre, positional_embedding_vlm from memory; MaxText has no CLIP.
"""

import numpy as np
from _common_b import (
    arrays,
    dense,
    embed,
    finish,
    from_heads,
    layers,
    mhdpa,
    nest,
    norm,
    put,
    stack,
)

MANNER = "maxtext"
ARCHITECTURE = "clip"
NOTES = (
    "both towers scanned on axis 1, biases and norms too; patch convolution as a linear layer over unfolded patches "
    "(c*p*p, d); text with fused qkv (d, layers, 3, heads, head_dim), vision with query/key/value apart"
)
VISION_HEADS, TEXT_HEADS = 3, 4


def torch_side():
    from transformers import CLIPConfig, CLIPModel

    return arrays(
        CLIPModel(
            CLIPConfig(
                text_config=dict(
                    hidden_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=TEXT_HEADS,
                    intermediate_size=128,
                    vocab_size=101,
                    max_position_embeddings=20,
                    bos_token_id=0,
                    eos_token_id=1,
                ),
                vision_config=dict(
                    hidden_size=48,
                    num_hidden_layers=4,
                    num_attention_heads=VISION_HEADS,
                    intermediate_size=192,
                    image_size=24,
                    patch_size=6,
                ),
                projection_dim=32,
            )
        )
    )


def vision_layer(t, p):
    return nest(
        input_layer_norm=norm(t, p + "layer_norm1"),
        self_attention_vision=mhdpa(t, p + "self_attn.", VISION_HEADS),
        post_attention_layer_norm=norm(t, p + "layer_norm2"),
        ClipVisionMLP_0=nest(
            vit_encoder_layer_mlp_fc1=dense(t, p + "mlp.fc1"),
            vit_encoder_layer_mlp_fc2=dense(t, p + "mlp.fc2"),
        ),
    )


def text_layer(t, p):
    h, qkv = TEXT_HEADS, [p + f"self_attn.{n}_proj." for n in "qkv"]
    d = t[qkv[0] + "weight"].shape[1]
    fused = {
        "kernel": np.stack([t[n + "weight"].T.reshape(d, h, -1) for n in qkv], 1),
        "bias": np.stack([t[n + "bias"].reshape(h, -1) for n in qkv]),
    }
    return nest(
        pre_self_attention_norm=norm(t, p + "layer_norm1"),
        self_attention=nest(qkv_proj=fused, out=from_heads(t, p + "self_attn.out_proj", h)),
        mlp=nest(
            mlp_layer_norm=norm(t, p + "layer_norm2"),
            wi=dense(t, p + "mlp.fc1"),
            wo=dense(t, p + "mlp.fc2"),
        ),
    )


def flax_side(t):
    v, x = "vision_model.", "text_model."
    w = t[v + "embeddings.patch_embedding.weight"]
    out = {
        "params/logit_scale": t["logit_scale"],
        "params/vision_encoder/class_embedding": t[v + "embeddings.class_embedding"],
        "params/vision_encoder/positional_embedding_vlm": t[
            v + "embeddings.position_embedding.weight"
        ],
        "params/vision_encoder/unfold_convolution/vit_unfold_linear/kernel": w.reshape(
            len(w), -1
        ).T,
    }
    for tower, name, layer in (
        (v, "vision_encoder", vision_layer),
        (x, "text_encoder", text_layer),
    ):
        p = tower + "encoder.layers."
        put(
            out,
            f"params/{name}/layers",
            stack([layer(t, f"{p}{i}.") for i in range(layers(t, p))], 1),
        )
    put(
        out,
        "params/vision_encoder",
        nest(
            layernorm_pre=norm(t, v + "pre_layrnorm"), layernorm_post=norm(t, v + "post_layernorm")
        ),
    )
    put(
        out,
        "params/text_encoder",
        nest(
            position_embedder=embed(t, x + "embeddings.position_embedding"),
            encoder_norm=norm(t, x + "final_layer_norm"),
        ),
    )
    put(
        out,
        "params",
        nest(
            token_embedder=embed(t, x + "embeddings.token_embedding"),
            visual_projection=dense(t, "visual_projection"),
            text_projection=dense(t, "text_projection"),
        ),
    )
    return finish(out)


LEFT = ()
EXTRA = ()
TIES = {}
