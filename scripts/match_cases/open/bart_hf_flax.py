"""BART as transformers 4's FlaxBartForConditionalGeneration. Source: modeling_flax_bart.py (looked up)."""

from _common_b import arrays, dense, embed, finish, layers, norm, put

MANNER = "hf_flax"
ARCHITECTURE = "bart"
NOTES = (
    "one shared table (model.shared.embedding) for both embed_tokens and the head; final_logits_bias (1, vocab) held as in torch; "
    "position tables with two rows more than positions; 3 encoder layers, 2 decoder layers (as distilled BARTs)"
)


def torch_side():
    from transformers import BartConfig, BartForConditionalGeneration

    return arrays(
        BartForConditionalGeneration(
            BartConfig(
                vocab_size=98,
                d_model=32,
                encoder_layers=3,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=128,
                decoder_ffn_dim=128,
                max_position_embeddings=30,
            )
        ),
        TIES,
    )


def flax_side(t):
    out = {"final_logits_bias": t["final_logits_bias"]}
    put(out, "model/shared", embed(t, "model.shared"))
    for side in ("encoder", "decoder"):
        p, q = f"model.{side}.", f"model/{side}"
        put(out, q + "/embed_positions", embed(t, p + "embed_positions"))
        put(out, q + "/layernorm_embedding", norm(t, p + "layernorm_embedding"))
        for i in range(layers(t, p + "layers.")):
            b, c = f"{p}layers.{i}.", f"{q}/layers/{i}"
            for a in ("self_attn", "encoder_attn")[: 1 + (side == "decoder")]:
                for n in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    put(out, f"{c}/{a}/{n}", dense(t, f"{b}{a}.{n}"))
                put(out, f"{c}/{a}_layer_norm", norm(t, f"{b}{a}_layer_norm"))
            for n in ("fc1", "fc2"):
                put(out, f"{c}/{n}", dense(t, b + n))
            put(out, c + "/final_layer_norm", norm(t, b + "final_layer_norm"))
    return finish(out)


LEFT = ()
EXTRA = ()
TIES = {
    n: "model.shared.weight"
    for n in (
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
        "lm_head.weight",
    )
}
