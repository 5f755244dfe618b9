"""DistilBERT as an engineer with opinions of their own might keep it in plain JAX. Source: from memory, nobody's."""
import numpy as np
from _common_b import arrays, finish, layers, put

MANNER = "own"
ARCHITECTURE = "distilbert"
NOTES = ("packed wqkv (d, heads * 3 * head_dim) with query, key and value next to each other inside every head, as Megatron packs them; "
         "norms are g and b; tok_emb, pos_emb, fc_up, fc_down; blocks stacked on a leading axis; the classifier transposed as usual")
HEADS = 4


def torch_side():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification
    return arrays(DistilBertForSequenceClassification(DistilBertConfig(
        vocab_size=115, dim=32, n_layers=4, n_heads=HEADS, hidden_dim=128, max_position_embeddings=24, num_labels=3)))


def ln(t, p):
    return {"g": t[p + ".weight"], "b": t[p + ".bias"]}


def block(t, p):
    qkv = [p + f"attention.{n}_lin." for n in "qkv"]
    d = t[qkv[0] + "weight"].shape[1]
    out = {"attn/wqkv": np.stack([t[n + "weight"].T.reshape(d, HEADS, -1) for n in qkv], 2).reshape(d, -1),
           "attn/bqkv": np.stack([t[n + "bias"].reshape(HEADS, -1) for n in qkv], 1).reshape(-1),
           "attn/wo": t[p + "attention.out_lin.weight"].T, "attn/bo": t[p + "attention.out_lin.bias"]}
    put(out, "attn_ln", ln(t, p + "sa_layer_norm"))
    for new, old in (("fc_up", "lin1"), ("fc_down", "lin2")):
        put(out, f"mlp/{new}", {"w": t[f"{p}ffn.{old}.weight"].T, "b": t[f"{p}ffn.{old}.bias"]})
    put(out, "mlp_ln", ln(t, p + "output_layer_norm"))
    return out


def flax_side(t):
    e, m = "distilbert.transformer.layer.", "distilbert.embeddings."
    out = {"tok_emb": t[m + "word_embeddings.weight"], "pos_emb": t[m + "position_embeddings.weight"]}
    put(out, "emb_ln", ln(t, m + "LayerNorm"))
    blocks = [block(t, f"{e}{i}.") for i in range(layers(t, e))]
    put(out, "blocks", {k: np.stack([b[k] for b in blocks]) for k in blocks[0]})
    put(out, "head/hidden", {"w": t["pre_classifier.weight"].T, "b": t["pre_classifier.bias"]})
    put(out, "head/out", {"w": t["classifier.weight"].T, "b": t["classifier.bias"]})
    return finish(out)


LEFT = ()
EXTRA = ()
TIES = {}
