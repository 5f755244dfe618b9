"""DistilBERT in MaxText's manner. Source: MaxText/layers/gpt3.py's helper layers and names (looked up); MaxText has no encoder-only
text model, the axis of the scan (param_scan_axis 1) from memory.
"""
from _common_b import arrays, dense, embed, finish, layers, mhdpa, nest, norm, put, stack

MANNER = "maxtext"
ARCHITECTURE = "distilbert"
NOTES = ("scanned on axis 1: query kernels (embed, layers, heads, head_dim), out (heads, layers, head_dim, embed), biases (heads, layers, "
         "head_dim), norms (embed, layers); post-norms; wi/wo")
HEADS = 4


def torch_side():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification
    return arrays(DistilBertForSequenceClassification(DistilBertConfig(
        vocab_size=110, dim=64, n_layers=3, n_heads=HEADS, hidden_dim=256, max_position_embeddings=40, num_labels=5)))


def layer(t, p):
    return nest(
        self_attention=mhdpa(t, p + "attention.", HEADS, "q_lin", "k_lin", "v_lin", "out_lin"),
        post_self_attention_norm=norm(t, p + "sa_layer_norm"),
        mlp=nest(wi=dense(t, p + "ffn.lin1"), wo=dense(t, p + "ffn.lin2")),
        post_mlp_norm=norm(t, p + "output_layer_norm"))


def flax_side(t):
    e, m = "distilbert.transformer.layer.", "distilbert.embeddings."
    out = {}
    put(out, "params/token_embedder", embed(t, m + "word_embeddings"))
    put(out, "params/encoder", nest(
        position_embedder=embed(t, m + "position_embeddings"), embedding_norm=norm(t, m + "LayerNorm"),
        layers=stack([layer(t, f"{e}{i}.") for i in range(layers(t, e))], 1)))
    put(out, "params/classification_head", nest(pooler_dense=dense(t, "pre_classifier"), logits_dense=dense(t, "classifier")))
    return finish(out)


LEFT = ()
EXTRA = ()
TIES = {}
