"""RoBERTa as transformers 4's FlaxRobertaForMaskedLM. Source: modeling_flax_roberta.py (looked up; layer names from memory)."""

from _common_b import arrays, dense, embed, finish, layers, norm, put

MANNER = "hf_flax"
ARCHITECTURE = "roberta"
NOTES = "names as torch's; the tied decoder is not held, its bias is lm_head.bias; token types a table of one row"
DENSE = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


def torch_side():
    from transformers import RobertaConfig, RobertaForMaskedLM

    return arrays(
        RobertaForMaskedLM(
            RobertaConfig(
                vocab_size=105,
                hidden_size=32,
                num_hidden_layers=4,
                num_attention_heads=2,
                intermediate_size=128,
                max_position_embeddings=42,
                type_vocab_size=1,
            )
        ),
        TIES,
    )


def flax_side(t):
    out = {"lm_head/bias": t["lm_head.bias"]}
    for n in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        put(out, f"roberta/embeddings/{n}", embed(t, f"roberta.embeddings.{n}"))
    put(out, "roberta/embeddings/LayerNorm", norm(t, "roberta.embeddings.LayerNorm"))
    for i in range(layers(t, "roberta.encoder.layer.")):
        p = f"roberta.encoder.layer.{i}."
        for n in DENSE:
            put(out, (p + n).replace(".", "/"), dense(t, p + n))
        for n in ("attention.output.LayerNorm", "output.LayerNorm"):
            put(out, (p + n).replace(".", "/"), norm(t, p + n))
    put(out, "lm_head/dense", dense(t, "lm_head.dense"))
    put(out, "lm_head/layer_norm", norm(t, "lm_head.layer_norm"))
    return finish(out)


LEFT = ()
EXTRA = ()
TIES = {
    "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
    "lm_head.decoder.bias": "lm_head.bias",
}
