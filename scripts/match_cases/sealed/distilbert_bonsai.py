"""DistilBERT in NNX with Gemma's einsum weights, in bonsai's manner. Source: from memory (gemma's layers); bonsai has no DistilBERT."""
import numpy as np
from _common_b import arrays, dense, finish, layers, nest, norm, put

MANNER = "bonsai"
ARCHITECTURE = "distilbert"
NOTES = ("q_einsum.w (heads, d, head_dim), kv_einsum.w (2, heads, d, head_dim), attn_vec_einsum.w (heads, head_dim, d), their biases "
         "called b; a list of layers; the table is called input_embedding")
HEADS = 3


def torch_side():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification
    return arrays(DistilBertForSequenceClassification(DistilBertConfig(
        vocab_size=92, dim=48, n_layers=2, n_heads=HEADS, hidden_dim=192, max_position_embeddings=28, num_labels=4)))


def per_head(t, p):
    w, b = t[p + ".weight"], t[p + ".bias"]
    return {"w": w.reshape(HEADS, -1, w.shape[1]).transpose(0, 2, 1), "b": b.reshape(HEADS, -1)}


def layer(t, p):
    k, v = per_head(t, p + "attention.k_lin"), per_head(t, p + "attention.v_lin")
    o = p + "attention.out_lin"
    d = len(t[o + ".weight"])
    return nest(
        attn=nest(q_einsum=per_head(t, p + "attention.q_lin"), kv_einsum={n: np.stack([k[n], v[n]]) for n in ("w", "b")},
                  attn_vec_einsum={"w": t[o + ".weight"].T.reshape(HEADS, -1, d), "b": t[o + ".bias"]}),
        post_attention_norm=norm(t, p + "sa_layer_norm"),
        mlp=nest(up_proj=dense(t, p + "ffn.lin1"), down_proj=dense(t, p + "ffn.lin2")),
        post_ffw_norm=norm(t, p + "output_layer_norm"))


def flax_side(t):
    m = "distilbert.embeddings."
    out = {"embedder/input_embedding": t[m + "word_embeddings.weight"],
           "embedder/position_embedding": t[m + "position_embeddings.weight"]}
    put(out, "embedder/norm", norm(t, m + "LayerNorm"))
    for i in range(layers(t, "distilbert.transformer.layer.")):
        put(out, f"layers/{i}", layer(t, f"distilbert.transformer.layer.{i}."))
    put(out, "pooler", dense(t, "pre_classifier"))
    put(out, "classifier", dense(t, "classifier"))
    return finish(out, "nnx")


LEFT = ()
EXTRA = ()
TIES = {}
