"""CLIP as google-research/scenic keeps OpenAI's weights. Source: scenic/projects/baselines/clip/layers.py, model.py (looked up)."""
from _common_b import arrays, conv, dense, embed, finish, layers, mhdpa, nest, norm, put

MANNER = "scenic"
ARCHITECTURE = "clip"
NOTES = ("OpenAI's names: visual/text, module names that contain a dot (resblocks.0), ln_1/ln_2, mlp.c_fc/c_proj, heads split "
         "off; positional_embedding and class_embedding are bare params; projections inside their towers (proj, text_projection)")
VISION_HEADS, TEXT_HEADS = 4, 2


def torch_side():
    from transformers import CLIPConfig, CLIPModel
    return arrays(CLIPModel(CLIPConfig(
        text_config=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=TEXT_HEADS, intermediate_size=128,
                         vocab_size=110, max_position_embeddings=18, bos_token_id=0, eos_token_id=1),
        vision_config=dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=VISION_HEADS, intermediate_size=256,
                           image_size=32, patch_size=8),
        projection_dim=24)))


def block(t, p, heads):
    return nest(ln_1=norm(t, p + "layer_norm1"), attn=mhdpa(t, p + "self_attn.", heads),
                ln_2=norm(t, p + "layer_norm2"),
                mlp=nest(c_fc=dense(t, p + "mlp.fc1"), c_proj=dense(t, p + "mlp.fc2")))


def flax_side(t):
    v, x = "vision_model.", "text_model."
    out = {"params/logit_scale": t["logit_scale"],
           "params/visual/class_embedding": t[v + "embeddings.class_embedding"],
           "params/visual/positional_embedding": t[v + "embeddings.position_embedding.weight"],
           "params/text/positional_embedding": t[x + "embeddings.position_embedding.weight"]}
    put(out, "params/visual", nest(
        conv1=conv(t, v + "embeddings.patch_embedding"), ln_pre=norm(t, v + "pre_layrnorm"),
        ln_post=norm(t, v + "post_layernorm"), proj=dense(t, "visual_projection")))
    put(out, "params/text", nest(
        token_embedding=embed(t, x + "embeddings.token_embedding"), ln_final=norm(t, x + "final_layer_norm"),
        text_projection=dense(t, "text_projection")))
    for tower, name, heads in ((v, "visual", VISION_HEADS), (x, "text", TEXT_HEADS)):
        for i in range(layers(t, tower + "encoder.layers.")):
            put(out, f"params/{name}/transformer/resblocks.{i}", block(t, f"{tower}encoder.layers.{i}.", heads))
    return finish(out)


LEFT = ()
EXTRA = ()
TIES = {}
