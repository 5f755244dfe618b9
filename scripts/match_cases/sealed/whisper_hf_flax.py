"""Whisper as FlaxWhisperForConditionalGeneration of transformers 4 keeps it with use_scan.

Source: a version of modeling_flax_whisper.py in the repository's history that has use_scan (looked up).
"""
from _common_b import arrays, conv, dense, embed, finish, layers, nest, norm, put, stack

MANNER = "hf_flax"
ARCHITECTURE = "whisper"
NOTES = ("names near torch's, but the layers scanned: layers.Layers.self_attn.q_proj.kernel with a leading layer axis; k_proj "
         "without bias; encoder and decoder of equal depth, so their stacked arrays have equal shapes; tied head not held")


def torch_side():
    from transformers import WhisperConfig, WhisperForConditionalGeneration
    return arrays(WhisperForConditionalGeneration(WhisperConfig(
        vocab_size=103, d_model=32, encoder_layers=4, decoder_layers=4, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=16, max_source_positions=40,
        max_target_positions=28, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3)), TIES)


def layer(t, p):
    out = nest(self_attn_layer_norm=norm(t, p + "self_attn_layer_norm"), final_layer_norm=norm(t, p + "final_layer_norm"),
               fc1=dense(t, p + "fc1"), fc2=dense(t, p + "fc2"))
    for a in ("self_attn", "encoder_attn"):
        if f"{p}{a}.q_proj.weight" in t:
            for n in ("q_proj", "k_proj", "v_proj", "out_proj"):
                put(out, f"{a}/{n}", dense(t, f"{p}{a}.{n}"))
            put(out, f"{a}_layer_norm", norm(t, f"{p}{a}_layer_norm"))
    return out


def flax_side(t):
    out = {}
    for side in ("encoder", "decoder"):
        p = f"model.{side}."
        n = layers(t, p + "layers.")
        put(out, f"model/{side}/layers/Layers", stack([layer(t, f"{p}layers.{i}.") for i in range(n)]))
        put(out, f"model/{side}", nest(layer_norm=norm(t, p + "layer_norm"), embed_positions=embed(t, p + "embed_positions")))
    put(out, "model/encoder", nest(conv1=conv(t, "model.encoder.conv1"), conv2=conv(t, "model.encoder.conv2")))
    put(out, "model/decoder/embed_tokens", embed(t, "model.decoder.embed_tokens"))
    return finish(out)


LEFT = ()
EXTRA = ()
TIES = {"proj_out.weight": "model.decoder.embed_tokens.weight"}
