"""Whisper as jax-ml/bonsai loads it. Source: bonsai/models/whisper/params.py (looked up; one version of several)."""
from _common_b import arrays, conv, dense, embed, finish, layers, mhdpa, nest, norm, put

MANNER = "bonsai"
ARCHITECTURE = "whisper"
NOTES = ("NNX, lists of layers, nnx.MultiHeadAttention names query/key/value/out with heads split off; key without bias. "
         "Torch side as save_pretrained writes it: without the tied proj_out, in the file's order; 2 encoder layers, 3 decoder layers")
HEADS = 2


def torch_side():
    from transformers import WhisperConfig, WhisperForConditionalGeneration
    return arrays(WhisperForConditionalGeneration(WhisperConfig(
        vocab_size=111, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=20, max_source_positions=36,
        max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3)), saved=True)


def layer(t, p):
    out = nest(fc1=dense(t, p + "fc1"), fc2=dense(t, p + "fc2"), final_layer_norm=norm(t, p + "final_layer_norm"))
    for a in ("self_attn", "encoder_attn"):
        if f"{p}{a}.q_proj.weight" in t:
            put(out, a, mhdpa(t, f"{p}{a}.", HEADS))
            put(out, f"{a}_layer_norm", norm(t, f"{p}{a}_layer_norm"))
    return out


def flax_side(t):
    out = {}
    for side in ("encoder", "decoder"):
        p = f"model.{side}."
        for i in range(layers(t, p + "layers.")):
            put(out, f"{side}/layers/{i}", layer(t, f"{p}layers.{i}."))
        put(out, side, nest(layer_norm=norm(t, p + "layer_norm"), embed_positions=embed(t, p + "embed_positions")))
    put(out, "encoder", nest(conv1=conv(t, "model.encoder.conv1"), conv2=conv(t, "model.encoder.conv2")))
    put(out, "decoder/embed_tokens", embed(t, "model.decoder.embed_tokens"))
    return finish(out, "nnx")


LEFT = ()
EXTRA = ()
TIES = {}
