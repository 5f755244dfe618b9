"""Sequence to sequence: a bidirectional GRU encoder and a GRUCell decoder with additive attention and coverage, teacher forced."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

SOS = 1


class Encoder(nn.Module):
    def __init__(self, vocab, emb_dim, enc_hid, dec_hid, dropout):
        super().__init__()
        self.embedding = nn.Embedding(vocab, emb_dim)
        self.rnn = nn.GRU(emb_dim, enc_hid, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(enc_hid * 2, dec_hid)
        self.dropout = nn.Dropout(dropout)

    def forward(self, src):
        outputs, hidden = self.rnn(self.dropout(self.embedding(src)))
        hidden = torch.tanh(self.fc(torch.cat((hidden[-2], hidden[-1]), dim=1)))
        return outputs, hidden


class BahdanauAttention(nn.Module):
    def __init__(self, enc_hid, dec_hid, attn_dim):
        super().__init__()
        self.query = nn.Linear(dec_hid, attn_dim)
        self.key = nn.Linear(2 * enc_hid, attn_dim, bias=False)
        self.cover = nn.Linear(1, attn_dim, bias=False)
        self.v = nn.Linear(attn_dim, 1, bias=False)

    def forward(self, hidden, enc, coverage, mask):
        energy = torch.tanh(self.query(hidden)[:, None] + self.key(enc) + self.cover(coverage[..., None]))
        scores = self.v(energy).squeeze(-1).masked_fill(~mask, -1e10)
        return torch.softmax(scores, dim=1)


class Decoder(nn.Module):
    def __init__(self, vocab, emb_dim, enc_hid, dec_hid, attn_dim, dropout):
        super().__init__()
        self.attention = BahdanauAttention(enc_hid, dec_hid, attn_dim)
        self.embedding = nn.Embedding(vocab, emb_dim)
        self.cell = nn.GRUCell(2 * enc_hid + emb_dim, dec_hid)
        self.fc_out = nn.Linear(2 * enc_hid + dec_hid + emb_dim, vocab)
        self.dropout = nn.Dropout(dropout)

    def forward(self, trg, hidden, enc, mask):
        coverage = enc.new_zeros(enc.shape[:2])
        logits, maps = [], []
        token = torch.full_like(trg[:, 0], SOS)
        for t in range(trg.shape[1]):
            emb = self.dropout(self.embedding(token))
            a = self.attention(hidden, enc, coverage, mask)
            context = torch.bmm(a.unsqueeze(1), enc).squeeze(1)
            hidden = self.cell(torch.cat((emb, context), dim=1), hidden)
            logits.append(self.fc_out(torch.cat((hidden, context, emb), dim=1)))
            maps.append(a)
            coverage = coverage + a
            token = trg[:, t]
        return torch.stack(logits, dim=1), torch.stack(maps, dim=1)


class Seq2Seq(nn.Module):
    def __init__(self, src_vocab=19, trg_vocab=17, emb_dim=10, enc_hid=8, dec_hid=12, attn_dim=14, pad=0, dropout=0.2):
        super().__init__()
        self.pad = pad
        self.encoder = Encoder(src_vocab, emb_dim, enc_hid, dec_hid, dropout)
        self.decoder = Decoder(trg_vocab, emb_dim, enc_hid, dec_hid, attn_dim, dropout)

    def forward(self, src, trg):
        enc, hidden = self.encoder(src)
        return self.decoder(trg, hidden, enc, src != self.pad)


class TorchStyleGRUCell(nnx.Module):
    """A GRU cell with both biases, gates r, z, n."""

    def __init__(self, din, hidden, *, rngs):
        self.inp = nnx.Linear(din, 3 * hidden, rngs=rngs)
        self.hid = nnx.Linear(hidden, 3 * hidden, rngs=rngs)

    def __call__(self, h, x):
        xr, xz, xn = jnp.split(self.inp(x), 3, axis=-1)
        hr, hz, hn = jnp.split(self.hid(h), 3, axis=-1)
        r = jax.nn.sigmoid(xr + hr)
        z = jax.nn.sigmoid(xz + hz)
        n = jnp.tanh(xn + r * hn)
        return (1 - z) * n + z * h


class FlaxEncoder(nnx.Module):
    def __init__(self, vocab, emb_dim, enc_hid, dec_hid, dropout, rngs):
        self.embed = nnx.Embed(vocab, emb_dim, rngs=rngs)
        self.forward_cell = TorchStyleGRUCell(emb_dim, enc_hid, rngs=rngs)
        self.backward_cell = TorchStyleGRUCell(emb_dim, enc_hid, rngs=rngs)
        self.bridge = nnx.Linear(2 * enc_hid, dec_hid, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.enc_hid = enc_hid

    def __call__(self, src):
        x = self.dropout(self.embed(src))
        h_f = h_b = jnp.zeros((x.shape[0], self.enc_hid), x.dtype)
        fwd, bwd = [], []
        for t in range(x.shape[1]):
            h_f = self.forward_cell(h_f, x[:, t])
            h_b = self.backward_cell(h_b, x[:, -1 - t])
            fwd.append(h_f)
            bwd.append(h_b)
        outputs = jnp.concatenate([jnp.stack(fwd, 1), jnp.stack(bwd[::-1], 1)], axis=-1)
        hidden = jnp.tanh(self.bridge(jnp.concatenate([h_f, h_b], axis=-1)))
        return outputs, hidden


class FlaxDecoder(nnx.Module):
    def __init__(self, vocab, emb_dim, enc_hid, dec_hid, attn_dim, dropout, rngs):
        self.W_query = nnx.Linear(dec_hid, attn_dim, rngs=rngs)
        self.W_key = nnx.Linear(2 * enc_hid, attn_dim, use_bias=False, rngs=rngs)
        self.W_cover = nnx.Linear(1, attn_dim, use_bias=False, rngs=rngs)
        self.v = nnx.Linear(attn_dim, 1, use_bias=False, rngs=rngs)
        self.embed = nnx.Embed(vocab, emb_dim, rngs=rngs)
        self.cell = TorchStyleGRUCell(2 * enc_hid + emb_dim, dec_hid, rngs=rngs)
        self.head = nnx.Linear(2 * enc_hid + dec_hid + emb_dim, vocab, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def attend(self, hidden, enc, coverage, mask):
        energy = jnp.tanh(self.W_query(hidden)[:, None] + self.W_key(enc) + self.W_cover(coverage[..., None]))
        scores = self.v(energy)[..., 0]
        return jax.nn.softmax(jnp.where(mask, scores, -1e10), axis=-1)

    def __call__(self, trg, hidden, enc, mask):
        inputs = jnp.concatenate([jnp.full_like(trg[:, :1], SOS), trg[:, :-1]], axis=1)
        embedded = self.dropout(self.embed(inputs))
        coverage = jnp.zeros(enc.shape[:2], enc.dtype)
        logits, maps = [], []
        for t in range(trg.shape[1]):
            emb = embedded[:, t]
            a = self.attend(hidden, enc, coverage, mask)
            context = jnp.einsum("bs,bsd->bd", a, enc)
            hidden = self.cell(hidden, jnp.concatenate([emb, context], axis=-1))
            logits.append(self.head(jnp.concatenate([hidden, context, emb], axis=-1)))
            maps.append(a)
            coverage = coverage + a
        return jnp.stack(logits, axis=1), jnp.stack(maps, axis=1)


class FlaxSeq2Seq(nnx.Module):
    def __init__(self, src_vocab=19, trg_vocab=17, emb_dim=10, enc_hid=8, dec_hid=12, attn_dim=14, pad=0, dropout=0.2, *, rngs):
        self.pad = pad
        self.encoder = FlaxEncoder(src_vocab, emb_dim, enc_hid, dec_hid, dropout, rngs)
        self.decoder = FlaxDecoder(trg_vocab, emb_dim, enc_hid, dec_hid, attn_dim, dropout, rngs)

    def __call__(self, src, trg):
        enc, hidden = self.encoder(src)
        return self.decoder(trg, hidden, enc, src != self.pad)


def port(net, model):
    sd = {k: jnp.asarray(v.numpy()) for k, v in net.state_dict().items()}

    def linear(dst, weight, bias=None):
        dst.kernel[...] = sd[weight].T
        if bias is not None:
            dst.bias[...] = sd[bias]

    enc, dec = model.encoder, model.decoder
    enc.embed.embedding[...] = sd["encoder.embedding.weight"]
    for cell, suffix in ((enc.forward_cell, "l0"), (enc.backward_cell, "l0_reverse")):
        linear(cell.inp, f"encoder.rnn.weight_ih_{suffix}", f"encoder.rnn.bias_ih_{suffix}")
        linear(cell.hid, f"encoder.rnn.weight_hh_{suffix}", f"encoder.rnn.bias_hh_{suffix}")
    linear(enc.bridge, "encoder.fc.weight", "encoder.fc.bias")
    dec.embed.embedding[...] = sd["decoder.embedding.weight"]
    linear(dec.cell.inp, "decoder.cell.weight_ih", "decoder.cell.bias_ih")
    linear(dec.cell.hid, "decoder.cell.weight_hh", "decoder.cell.bias_hh")
    linear(dec.W_query, "decoder.attention.query.weight", "decoder.attention.query.bias")
    linear(dec.W_key, "decoder.attention.key.weight")
    linear(dec.W_cover, "decoder.attention.cover.weight")
    linear(dec.v, "decoder.attention.v.weight")
    linear(dec.head, "decoder.fc_out.weight", "decoder.fc_out.bias")


def build(seed):
    """The right pair with random weights and inputs that follow from the seed."""
    torch.manual_seed(seed)
    net = Seq2Seq().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0.0, 0.6)
    model = FlaxSeq2Seq(rngs=nnx.Rngs(seed))
    port(net, model)
    model.eval()
    rng = np.random.default_rng(seed)
    src, trg = rng.integers(2, 19, size=(3, 7)), rng.integers(2, 17, size=(3, 5))
    src[0, 5:] = 0
    src[2, 4:] = 0
    return {"torch": net, "flax": model, "inputs": (src, trg)}


FAULTS = [
    {
        "title": "hidden bias of gate n added outside r * (...)",
        "edits": [("        n = jnp.tanh(xn + r * hn)\n",
                   "        b = jnp.split(self.hid.bias[...], 3)[2]\n        n = jnp.tanh(xn + r * (hn - b) + b)\n")],
        "layers": ["encoder.rnn", "decoder.cell"],
        "causes": ["gru_bias"],
        "level": "outputs",
    },
    {
        "title": "attention asks with the hidden state after the step (Luong's order)",
        "edits": [("            a = self.attend(hidden, enc, coverage, mask)\n            context = jnp.einsum(\"bs,bsd->bd\", a, enc)\n",
                   "            a = self.attend(hidden, enc, coverage, mask)\n            context = jnp.einsum(\"bs,bsd->bd\", a, enc)\n"
                   "            ahead = self.cell(hidden, jnp.concatenate([emb, context], axis=-1))\n"
                   "            a = self.attend(ahead, enc, coverage, mask)\n            context = jnp.einsum(\"bs,bsd->bd\", a, enc)\n")],
        "layers": ["decoder", "decoder.attention"],
        "between": ("decoder.embedding", "decoder.attention.query"),
        "causes": ["operand", "order"],
        "level": "outputs",
    },
    {
        "title": "bridge takes the encoder's outputs of the last step, not its last states",
        "edits": [("self.bridge(jnp.concatenate([h_f, h_b], axis=-1))", "self.bridge(outputs[:, -1])")],
        "layers": ["encoder"],
        "between": ("encoder.rnn", "encoder.fc"),
        "causes": ["token"],
        "level": "outputs",
    },
    {
        "title": "decoder is fed the target of the same step, unshifted",
        "edits": [("inputs = jnp.concatenate([jnp.full_like(trg[:, :1], SOS), trg[:, :-1]], axis=1)", "inputs = trg")],
        "layers": ["decoder"],
        "between": ("encoder.fc", "decoder.embedding"),
        "causes": ["offset", "operand"],
        "level": "outputs",
    },
    {
        "title": "coverage holds the last attention only",
        "edits": [("            coverage = coverage + a\n        return jnp.stack", "            coverage = a\n        return jnp.stack")],
        "layers": ["decoder"],
        "between": ("decoder.fc_out", "decoder.embedding"),
        "causes": ["residual", "left_out"],
        "level": "outputs",
    },
    {
        "title": "source mask multiplied onto the weights after the softmax",
        "edits": [("return jax.nn.softmax(jnp.where(mask, scores, -1e10), axis=-1)", "return jax.nn.softmax(scores, axis=-1) * mask")],
        "layers": ["decoder.attention"],
        "between": ("decoder.attention.v", "decoder.cell"),
        "causes": ["order", "mask"],
        "level": "outputs",
    },
    {
        "title": "the encoder's reverse direction gets the forward direction's hidden weights",
        "edits": [("        linear(cell.hid, f\"encoder.rnn.weight_hh_{suffix}\", f\"encoder.rnn.bias_hh_{suffix}\")\n",
                   "        linear(cell.hid, \"encoder.rnn.weight_hh_l0\", f\"encoder.rnn.bias_hh_{suffix}\")\n")],
        "layers": ["encoder.rnn"],
        "causes": ["values", "swapped"],
        "level": "outputs",
    },
    {
        "title": "decoder's dropout written as a probability to keep",
        "edits": [("        self.head = nnx.Linear(2 * enc_hid + dec_hid + emb_dim, vocab, rngs=rngs)\n        self.dropout = nnx.Dropout(dropout, rngs=rngs)",
                   "        self.head = nnx.Linear(2 * enc_hid + dec_hid + emb_dim, vocab, rngs=rngs)\n        self.dropout = nnx.Dropout(1 - dropout, rngs=rngs)")],
        "layers": ["decoder.dropout"],
        "causes": ["training_attribute"],
        "level": "attributes",
    },
]
