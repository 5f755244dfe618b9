"""RoBERTa (masked LM) in levanter. Source: levanter/models/roberta.py of a contributor's branch (looked up)."""

from _common_b import arrays, finish, layers, nest, plain, put, stack

MANNER = "levanter"
ARCHITECTURE = "roberta"
NOTES = (
    "out_first=True, so (layers, out, in), all square ones possible to confuse; encoder.layer.stacked; heads not split "
    "(embed_att); fields in declared order: the encoder before the embeddings. Its decoder is a Linear of its own, so the "
    "torch side is untied (tie_word_embeddings=False), where transformers leaves lm_head.bias beside lm_head.decoder.bias, unused"
)


def torch_side():
    from transformers import RobertaConfig, RobertaForMaskedLM

    return arrays(
        RobertaForMaskedLM(
            RobertaConfig(
                vocab_size=95,
                hidden_size=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=192,
                max_position_embeddings=34,
                type_vocab_size=1,
                tie_word_embeddings=False,
            )
        )
    )


def layer(t, p):
    return nest(
        attention=nest(
            self_attn=nest(
                q_proj=plain(t, p + "attention.self.query"),
                k_proj=plain(t, p + "attention.self.key"),
                v_proj=plain(t, p + "attention.self.value"),
            ),
            output=nest(
                dense=plain(t, p + "attention.output.dense"),
                LayerNorm=plain(t, p + "attention.output.LayerNorm"),
            ),
        ),
        intermediate=nest(dense=plain(t, p + "intermediate.dense")),
        output=nest(dense=plain(t, p + "output.dense"), LayerNorm=plain(t, p + "output.LayerNorm")),
    )


def flax_side(t):
    e, m = "roberta.encoder.layer.", "roberta.embeddings."
    out = {}
    put(
        out,
        "roberta/encoder/layer/stacked",
        stack([layer(t, f"{e}{i}.") for i in range(layers(t, e))]),
    )
    put(
        out,
        "roberta/embeddings",
        nest(
            word_embeddings=plain(t, m + "word_embeddings"),
            position_embeddings=plain(t, m + "position_embeddings"),
            token_type_embeddings=plain(t, m + "token_type_embeddings"),
            LayerNorm=plain(t, m + "LayerNorm"),
        ),
    )
    put(
        out,
        "lm_head",
        nest(
            dense=plain(t, "lm_head.dense"),
            layer_norm=plain(t, "lm_head.layer_norm"),
            decoder=plain(t, "lm_head.decoder"),
        ),
    )
    return finish(out, "eqx")


LEFT = ("lm_head.bias",)
EXTRA = ()
TIES = {}
