"""Whisper as stanford-crfm/levanter keeps it. Source: levanter/models/whisper.py, haliax/nn/conv.py (looked up)."""
from _common_b import arrays, embed, dense, finish, from_heads, hax, layers, nest, norm, plain, put, stack, to_heads

MANNER = "levanter"
ARCHITECTURE = "whisper"
NOTES = ("stacked on axis 0 under transformer.layers.stacked; out_first=False, so (embed, heads, head_size) and (embed, mlp), but "
         "everything is called weight; convolutions (out, in, k) as torch; k_proj without bias; fields in declared order; the "
         "encoder's sinusoids are computed, not held; tied head not held; 3 encoder layers, 2 decoder layers")
HEADS = 6


def torch_side():
    from transformers import WhisperConfig, WhisperForConditionalGeneration
    return arrays(WhisperForConditionalGeneration(WhisperConfig(
        vocab_size=97, d_model=48, encoder_layers=3, decoder_layers=2, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=192, decoder_ffn_dim=192, num_mel_bins=20, max_source_positions=30,
        max_target_positions=24, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3)), TIES)


def attention(t, p):
    return nest(q_proj=to_heads(t, p + "q_proj", HEADS), k_proj=to_heads(t, p + "k_proj", HEADS),
                v_proj=to_heads(t, p + "v_proj", HEADS), out_proj=from_heads(t, p + "out_proj", HEADS))


def layer(t, p):
    cross = {}
    if p + "encoder_attn.q_proj.weight" in t:
        cross = dict(encoder_attn=attention(t, p + "encoder_attn."), encoder_attn_ln=norm(t, p + "encoder_attn_layer_norm"))
    return nest(self_attn=attention(t, p + "self_attn."), attn_ln=norm(t, p + "self_attn_layer_norm"), **cross,
                mlp=nest(fc1=dense(t, p + "fc1"), fc2=dense(t, p + "fc2")), mlp_ln=norm(t, p + "final_layer_norm"))


def transformer(t, p):
    n = layers(t, p + "layers.")
    return hax(nest(layers=nest(stacked=stack([layer(t, f"{p}layers.{i}.") for i in range(n)])),
                    layer_norm=norm(t, p + "layer_norm")))


def flax_side(t):
    e, d = "model.encoder.", "model.decoder."
    out = {}
    put(out, "encoder", nest(conv1=plain(t, e + "conv1"), conv2=plain(t, e + "conv2"), transformer=transformer(t, e)))
    put(out, "decoder", nest(
        transformer=transformer(t, d),
        embeddings=hax(nest(token_embeddings=embed(t, d + "embed_tokens"), position_embeddings=embed(t, d + "embed_positions")))))
    return finish(out, "eqx")


LEFT = ("model.encoder.embed_positions.weight",)
EXTRA = ()
TIES = {"proj_out.weight": "model.decoder.embed_tokens.weight"}
