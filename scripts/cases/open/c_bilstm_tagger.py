"""A sequence tagger: two bidirectional LSTM layers over packed sentences, per-token tags and a sentence label; functional JAX."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class BiLSTMTagger(nn.Module):
    def __init__(self, vocab_size=23, embedding_dim=10, hidden_dim=8, n_tags=5, n_labels=3, pad=0):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_dim, padding_idx=pad)
        self.lstm = nn.LSTM(embedding_dim, hidden_dim, num_layers=2, bidirectional=True, batch_first=True, dropout=0.3)
        self.hidden2tag = nn.Linear(2 * hidden_dim + embedding_dim, n_tags)
        self.classifier = nn.Linear(4 * hidden_dim, n_labels)

    def forward(self, tokens, lengths):
        emb = self.embedding(tokens)
        packed = pack_padded_sequence(emb, lengths.cpu(), batch_first=True, enforce_sorted=False)
        packed, (h_n, _) = self.lstm(packed)
        out, _ = pad_packed_sequence(packed, batch_first=True, total_length=tokens.shape[1])
        tags = torch.log_softmax(self.hidden2tag(torch.cat([out, emb], dim=-1)), dim=-1)
        mask = torch.arange(tokens.shape[1])[None, :, None] < lengths[:, None, None]
        pooled = out.masked_fill(~mask, -1e4).amax(dim=1)
        sentence = torch.cat([h_n[-2], h_n[-1], pooled], dim=-1)
        return tags, self.classifier(sentence)


def lstm_direction(p, x, mask, reverse=False):
    """One direction of one layer: x (batch, time, features), mask (batch, time)."""
    hidden = p["w_hh"].shape[0]
    if reverse:
        x, mask = x[:, ::-1], mask[:, ::-1]
    start = jnp.zeros((x.shape[0], hidden), x.dtype)

    def step(carry, inp):
        h, c = carry
        x_t, m = inp
        z = x_t @ p["w_ih"] + p["b_ih"] + h @ p["w_hh"] + p["b_hh"]
        i, f, g, o = jnp.split(z, 4, axis=-1)
        c_new = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h_new = jax.nn.sigmoid(o) * jnp.tanh(c_new)
        h = jnp.where(m[:, None], h_new, h)
        c = jnp.where(m[:, None], c_new, c)
        return (h, c), jnp.where(m[:, None], h_new, 0.0)

    (h, _), ys = jax.lax.scan(step, (start, start), (x.swapaxes(0, 1), mask.T))
    ys = ys.swapaxes(0, 1)
    if reverse:
        ys = ys[:, ::-1]
    return ys, h


def bilstm(layers, x, mask):
    for p in layers:
        fwd, h_fwd = lstm_direction(p["forward"], x, mask)
        bwd, h_bwd = lstm_direction(p["backward"], x, mask, reverse=True)
        x = jnp.concatenate([fwd, bwd], axis=-1)
    return x, h_fwd, h_bwd


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def embed(table, tokens, pad=0):
    x = table[tokens]
    return jnp.where((tokens == pad)[..., None], jax.lax.stop_gradient(x), x)


def tagger(params, tokens, lengths):
    mask = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    emb = embed(params["embedding"], tokens)
    out, h_fwd, h_bwd = bilstm(params["lstm"], emb, mask)
    logits = linear(params["hidden2tag"], jnp.concatenate([out, emb], axis=-1))
    tags = jax.nn.log_softmax(logits, axis=-1)
    pooled = jnp.max(jnp.where(mask[..., None], out, -1e4), axis=1)
    sentence = jnp.concatenate([h_fwd, h_bwd, pooled], axis=-1)
    return tags, linear(params["classifier"], sentence)


def port(net):
    sd = {k: jnp.asarray(v.numpy()) for k, v in net.state_dict().items()}

    def direction(suffix):
        return {
            "w_ih": sd[f"lstm.weight_ih_{suffix}"].T,
            "w_hh": sd[f"lstm.weight_hh_{suffix}"].T,
            "b_ih": sd[f"lstm.bias_ih_{suffix}"],
            "b_hh": sd[f"lstm.bias_hh_{suffix}"],
        }

    def dense(name):
        return {"kernel": sd[f"{name}.weight"].T, "bias": sd[f"{name}.bias"]}

    return {
        "embedding": sd["embedding.weight"],
        "lstm": [{"forward": direction(f"l{n}"), "backward": direction(f"l{n}_reverse")} for n in range(2)],
        "hidden2tag": dense("hidden2tag"),
        "classifier": dense("classifier"),
    }


def build(seed):
    """The right pair with random weights and inputs that follow from the seed."""
    torch.manual_seed(seed)
    net = BiLSTMTagger().eval()
    for p in net.parameters():
        p.data.normal_(0, 0.5)
    rng = np.random.default_rng(seed)
    lengths = np.array([9, 4, 7])
    tokens = rng.integers(1, 23, size=(3, 9))
    tokens[np.arange(9)[None] >= lengths[:, None]] = 0
    return {"torch": net, "flax": (tagger, port(net)), "inputs": (tokens, lengths)}


FAULTS = [
    {
        "title": "gates read in the order i, g, f, o",
        "edits": [("i, f, g, o = jnp.split(z, 4, axis=-1)", "i, g, f, o = jnp.split(z, 4, axis=-1)")],
        "layers": ["lstm"],
        "causes": ["gates"],
        "level": "outputs",
    },
    {
        "title": "the cell state leaves the LSTM without its tanh",
        "edits": [("h_new = jax.nn.sigmoid(o) * jnp.tanh(c_new)", "h_new = jax.nn.sigmoid(o) * c_new")],
        "layers": ["lstm"],
        "causes": ["activation", "left_out", "missing_layer"],
        "level": "outputs",
    },
    {
        "title": "the backward direction starts in the padding",
        "edits": [("bwd, h_bwd = lstm_direction(p[\"backward\"], x, mask, reverse=True)",
                   "bwd, h_bwd = lstm_direction(p[\"backward\"], x, jnp.ones_like(mask), reverse=True)\n"
                   "        bwd = jnp.where(mask[..., None], bwd, 0.0)")],
        "layers": ["lstm"],
        "causes": ["mask"],
        "level": "outputs",
    },
    {
        "title": "outputs of the backward direction not turned back",
        "edits": [("    if reverse:\n        ys = ys[:, ::-1]\n", "")],
        "layers": ["lstm"],
        "causes": ["reversed"],
        "level": "outputs",
    },
    {
        "title": "last states joined backward first",
        "edits": [("jnp.concatenate([h_fwd, h_bwd, pooled], axis=-1)", "jnp.concatenate([h_bwd, h_fwd, pooled], axis=-1)")],
        "layers": [""],
        "between": ("lstm", "classifier"),
        "causes": ["concat"],
        "level": "outputs",
    },
    {
        "title": "hidden bias of the reverse direction left at zero",
        "edits": [("            \"b_hh\": sd[f\"lstm.bias_hh_{suffix}\"],\n",
                   "            \"b_hh\": sd[f\"lstm.bias_hh_{suffix}\"] * (\"reverse\" not in suffix),\n")],
        "layers": ["lstm"],
        "causes": ["bias_missing", "default"],
        "level": "outputs",
    },
    {
        "title": "tag scores normalised over the steps",
        "edits": [("tags = jax.nn.log_softmax(logits, axis=-1)", "tags = jax.nn.log_softmax(logits, axis=1)")],
        "layers": [""],
        "between": ("hidden2tag", "classifier"),
        "causes": ["softmax_axis", "axis"],
        "level": "outputs",
    },
    {
        "title": "row of padding takes a gradient",
        "edits": [("    x = table[tokens]\n    return jnp.where((tokens == pad)[..., None], jax.lax.stop_gradient(x), x)\n",
                   "    return table[tokens]\n")],
        "layers": ["embedding"],
        "causes": ["padding_idx"],
        "level": "gradients",
    },
]
