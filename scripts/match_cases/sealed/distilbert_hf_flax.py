"""DistilBERT as transformers 4's FlaxDistilBertForSequenceClassification. Source: modeling_flax_distilbert.py (looked up)."""
from _common_b import arrays, dense, embed, finish, layers, norm, put

MANNER = "hf_flax"
ARCHITECTURE = "distilbert"
NOTES = "torch's names with kernel/scale/embedding; q_lin, k_lin, v_lin, out_lin and pre_classifier all square"


def torch_side():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification
    return arrays(DistilBertForSequenceClassification(DistilBertConfig(
        vocab_size=104, dim=48, n_layers=3, n_heads=4, hidden_dim=192, max_position_embeddings=32, num_labels=2)))


def flax_side(t):
    out = {}
    for n in ("word_embeddings", "position_embeddings"):
        put(out, f"distilbert/embeddings/{n}", embed(t, f"distilbert.embeddings.{n}"))
    put(out, "distilbert/embeddings/LayerNorm", norm(t, "distilbert.embeddings.LayerNorm"))
    for i in range(layers(t, "distilbert.transformer.layer.")):
        p = f"distilbert.transformer.layer.{i}."
        for n in ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2"):
            put(out, (p + n).replace(".", "/"), dense(t, p + n))
        for n in ("sa_layer_norm", "output_layer_norm"):
            put(out, (p + n).replace(".", "/"), norm(t, p + n))
    put(out, "pre_classifier", dense(t, "pre_classifier"))
    put(out, "classifier", dense(t, "classifier"))
    return finish(out)


LEFT = ()
EXTRA = ()
TIES = {}
