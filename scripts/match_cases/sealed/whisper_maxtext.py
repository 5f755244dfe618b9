"""Whisper in MaxText's manner. Source: MaxText/layers/audio_encoders.py (looked up) for the encoder, gpt3.py's names (looked up)
for the decoder, whose cross-attention is in its manner; MaxText has no Whisper.
"""
from _common_b import arrays, conv, dense, embed, finish, layers, mhdpa, nest, norm, put, stack

MANNER = "maxtext"
ARCHITECTURE = "whisper"
NOTES = ("the audio encoder is a Python loop (layers_N, long names), the decoder is scanned on axis 1 (biases and norms too); "
         "sinusoids computed, not held; heads split off; logits via the embedding")
HEADS = 4


def torch_side():
    from transformers import WhisperConfig, WhisperForConditionalGeneration
    return arrays(WhisperForConditionalGeneration(WhisperConfig(
        vocab_size=118, d_model=64, encoder_layers=2, decoder_layers=4, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=256, decoder_ffn_dim=256, num_mel_bins=24, max_source_positions=32,
        max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3)), TIES)


def encoder_layer(t, p):
    return nest(input_layer_norm=norm(t, p + "self_attn_layer_norm"),
                self_attention_audio=mhdpa(t, p + "self_attn.", HEADS),
                post_attention_layer_norm=norm(t, p + "final_layer_norm"),
                AudioMLP=nest(audio_encoder_layer_mlp_fc1=dense(t, p + "fc1"), audio_encoder_layer_mlp_fc2=dense(t, p + "fc2")))


def decoder_layer(t, p):
    return nest(pre_self_attention_norm=norm(t, p + "self_attn_layer_norm"), self_attention=mhdpa(t, p + "self_attn.", HEADS),
                pre_cross_attention_norm=norm(t, p + "encoder_attn_layer_norm"),
                cross_attention=mhdpa(t, p + "encoder_attn.", HEADS),
                mlp=nest(mlp_layer_norm=norm(t, p + "final_layer_norm"), wi=dense(t, p + "fc1"), wo=dense(t, p + "fc2")))


def flax_side(t):
    e, d = "model.encoder.", "model.decoder."
    out = {}
    put(out, "params/audio_encoder", nest(conv1d1=conv(t, e + "conv1"), conv1d2=conv(t, e + "conv2"),
                                          layernorm_post=norm(t, e + "layer_norm")))
    for i in range(layers(t, e + "layers.")):
        put(out, f"params/audio_encoder/AudioEncoder/layers_{i}", encoder_layer(t, f"{e}layers.{i}."))
    n = layers(t, d + "layers.")
    put(out, "params/decoder", nest(layers=stack([decoder_layer(t, f"{d}layers.{i}.") for i in range(n)], 1),
                                    decoder_norm=norm(t, d + "layer_norm"), position_embedder=embed(t, d + "embed_positions")))
    put(out, "params/token_embedder", embed(t, d + "embed_tokens"))
    return finish(out)


LEFT = ("model.encoder.embed_positions.weight",)
EXTRA = ()
TIES = {"proj_out.weight": "model.decoder.embed_tokens.weight"}
