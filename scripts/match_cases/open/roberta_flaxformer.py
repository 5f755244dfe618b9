"""RoBERTa as google/flaxformer keeps a BERT. Source: flaxformer/architectures/bert/testdata/model_param_shapes.json and heads.py
(looked up); the two roots (encoder, mlm_head) are the case's own.
"""

from _common_b import arrays, dense, embed, finish, layers, nest, norm, put

MANNER = "flaxformer"
ARCHITECTURE = "roberta"
NOTES = (
    "mlp_block.mlp.dense_layer is the up-projection and mlp_block.dense_layer the down-projection; attention_block.dense_layer "
    "the output projection; kernels 2-D; embedder.embedders_token_ids; the embedding's norm is encoder.layer_norm. Torch side "
    "as save_pretrained writes it: without the tied decoder and its bias"
)


def torch_side():
    from transformers import RobertaConfig, RobertaForMaskedLM

    return arrays(
        RobertaForMaskedLM(
            RobertaConfig(
                vocab_size=130,
                hidden_size=40,
                num_hidden_layers=2,
                num_attention_heads=5,
                intermediate_size=160,
                max_position_embeddings=26,
                type_vocab_size=1,
            )
        ),
        saved=True,
    )


def layer(t, p):
    a = p + "attention."
    return nest(
        attention_block=nest(
            attention_layer=nest(
                query=dense(t, a + "self.query"),
                key=dense(t, a + "self.key"),
                value=dense(t, a + "self.value"),
            ),
            dense_layer=dense(t, a + "output.dense"),
            layer_norm=norm(t, a + "output.LayerNorm"),
        ),
        mlp_block=nest(
            mlp=nest(dense_layer=dense(t, p + "intermediate.dense")),
            dense_layer=dense(t, p + "output.dense"),
            layer_norm=norm(t, p + "output.LayerNorm"),
        ),
    )


def flax_side(t):
    m = "roberta.embeddings."
    out = {"mlm_head/bias": t["lm_head.bias"]}
    put(
        out,
        "encoder/embedder",
        nest(
            embedders_token_ids=embed(t, m + "word_embeddings"),
            embedders_position_ids=embed(t, m + "position_embeddings"),
            embedders_segment_ids=embed(t, m + "token_type_embeddings"),
        ),
    )
    put(out, "encoder/layer_norm", norm(t, m + "LayerNorm"))
    for i in range(layers(t, "roberta.encoder.layer.")):
        put(
            out,
            f"encoder/encoder_block/layer_sequence/layers_{i}",
            layer(t, f"roberta.encoder.layer.{i}."),
        )
    put(
        out,
        "mlm_head",
        nest(dense=dense(t, "lm_head.dense"), layer_norm=norm(t, "lm_head.layer_norm")),
    )
    return finish(out)


LEFT = ()
EXTRA = ()
TIES = {}
