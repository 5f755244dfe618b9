"""Sequence tagger: char CNN, highway, bidirectional GRU and a linear-chain CRF, against nnx with lax.scan."""
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as nn
from flax import nnx


class CRF(nn.Module):
    """After pytorch-crf, batch first."""

    def __init__(self, num_tags):
        super().__init__()
        self.start_transitions = nn.Parameter(torch.empty(num_tags))
        self.end_transitions = nn.Parameter(torch.empty(num_tags))
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags))
        for p in self.parameters():
            nn.init.uniform_(p, -1.0, 1.0)

    def forward(self, emissions, tags, mask):
        emissions, tags, mask = emissions.transpose(0, 1), tags.transpose(0, 1), mask.transpose(0, 1).bool()
        numerator = self._compute_score(emissions, tags, mask)
        return numerator - self._recursion(emissions, mask, torch.logsumexp), self._recursion(emissions, mask, torch.amax)

    def _compute_score(self, emissions, tags, mask):
        seq_length, batch_size = tags.shape
        arange = torch.arange(batch_size)
        score = self.start_transitions[tags[0]] + emissions[0, arange, tags[0]]
        for i in range(1, seq_length):
            score = score + self.transitions[tags[i - 1], tags[i]] * mask[i]
            score = score + emissions[i, arange, tags[i]] * mask[i]
        seq_ends = mask.long().sum(dim=0) - 1
        return score + self.end_transitions[tags[seq_ends, arange]]

    def _recursion(self, emissions, mask, reduce):
        score = self.start_transitions + emissions[0]
        for i in range(1, emissions.shape[0]):
            next_score = score.unsqueeze(2) + self.transitions + emissions[i].unsqueeze(1)
            score = torch.where(mask[i].unsqueeze(1), reduce(next_score, dim=1), score)
        return reduce(score + self.end_transitions, dim=1)


class CharCNN(nn.Module):
    def __init__(self, num_chars, dim, filters):
        super().__init__()
        self.embedding = nn.Embedding(num_chars, dim)
        self.conv = nn.Conv1d(dim, filters, kernel_size=3, padding=1)

    def forward(self, chars):
        b, t, l = chars.shape
        flat = chars.reshape(b * t, l)
        h = self.conv(self.embedding(flat).transpose(1, 2))
        h = h.masked_fill((flat == 0).unsqueeze(1), float("-1e4"))
        return h.max(dim=2).values.view(b, t, -1)


class Highway(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.transform = nn.Linear(size, size)
        self.gate = nn.Linear(size, size)

    def forward(self, x):
        h = torch.relu(self.transform(x))
        g = torch.sigmoid(self.gate(x))
        return g * h + (1 - g) * x


class Tagger(nn.Module):
    def __init__(self, vocab, num_chars, tags, word_dim=9, char_dim=6, filters=7, hidden=10):
        super().__init__()
        self.word_embedding = nn.Embedding(vocab, word_dim)
        self.char_cnn = CharCNN(num_chars, char_dim, filters)
        self.highway = Highway(word_dim + filters)
        self.gru = nn.GRU(word_dim + filters, hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(0.3)
        self.hidden2tag = nn.Linear(2 * hidden, tags)
        self.crf = CRF(tags)

    def forward(self, words, chars, tags, mask):
        x = torch.cat([self.word_embedding(words), self.char_cnn(chars)], dim=-1)
        x, _ = self.gru(self.highway(x))
        emissions = self.hidden2tag(self.dropout(x))
        log_likelihood, best = self.crf(emissions, tags, mask)
        return emissions, log_likelihood, best


# ------------------------------------------------------------------ Flax NNX

def logsumexp(a, axis):
    peak = a.max(axis=axis, keepdims=True)
    return jnp.log(jnp.exp(a - peak).sum(axis=axis)) + jnp.squeeze(peak, axis)


class GRUDirection(nnx.Module):
    def __init__(self, features, hidden, reverse, rngs):
        self.wi = nnx.Linear(features, 3 * hidden, rngs=rngs)
        self.wh = nnx.Linear(hidden, 3 * hidden, rngs=rngs)
        self.hidden, self.reverse = hidden, reverse

    def __call__(self, x):
        if self.reverse:
            x = jnp.flip(x, axis=1)
        pre = jnp.swapaxes(self.wi(x), 0, 1)
        kernel, bias = self.wh.kernel[...], self.wh.bias[...]

        def step(h, gates):
            ir, iz, inew = jnp.split(gates, 3, axis=-1)
            hr, hz, hnew = jnp.split(h @ kernel + bias, 3, axis=-1)
            r, z = jax.nn.sigmoid(ir + hr), jax.nn.sigmoid(iz + hz)
            n = jnp.tanh(inew + r * hnew)
            h = (1.0 - z) * n + z * h
            return h, h

        h0 = jnp.zeros((x.shape[0], self.hidden), pre.dtype)
        _, ys = jax.lax.scan(step, h0, pre)
        ys = jnp.swapaxes(ys, 0, 1)
        if self.reverse:
            ys = jnp.flip(ys, axis=1)
        return ys


class LinearChainCRF(nnx.Module):
    def __init__(self, n, rngs):
        init = nnx.initializers.uniform(0.1)
        self.start = nnx.Param(init(rngs.params(), (n,)))
        self.end = nnx.Param(init(rngs.params(), (n,)))
        self.trans = nnx.Param(init(rngs.params(), (n, n)))

    def path_score(self, emissions, tags, mask):
        unary = jnp.take_along_axis(emissions, tags[..., None], axis=-1)[..., 0]
        pair = self.trans[...][tags[:, :-1], tags[:, 1:]]
        total = self.start[...][tags[:, 0]] + (unary * mask).sum(axis=1) + (pair * mask[:, 1:]).sum(axis=1)
        last = mask.sum(axis=1).astype(int) - 1
        last_tag = jnp.take_along_axis(tags, last[:, None], axis=1)[:, 0]
        return total + self.end[...][last_tag]

    def forward_scores(self, emissions, mask, reduce):
        trans = self.trans[...]

        def step(alpha, inputs):
            emit, valid = inputs
            scores = alpha[:, :, None] + trans[None] + emit[:, None, :]
            alpha = jnp.where(valid[:, None] > 0, reduce(scores, axis=1), alpha)
            return alpha, None

        alpha = self.start[...] + emissions[:, 0]
        rest = (emissions[:, 1:].swapaxes(0, 1), mask[:, 1:].T)
        alpha, _ = jax.lax.scan(step, alpha, rest)
        return reduce(alpha + self.end[...], axis=1)

    def __call__(self, emissions, tags, mask):
        log_z = self.forward_scores(emissions, mask, logsumexp)
        return self.path_score(emissions, tags, mask) - log_z, self.forward_scores(emissions, mask, jnp.max)


class CharEncoder(nnx.Module):
    def __init__(self, num_chars, dim, filters, rngs):
        self.embed = nnx.Embed(num_chars, dim, rngs=rngs)
        self.conv = nnx.Conv(dim, filters, (3,), padding=1, rngs=rngs)

    def __call__(self, chars):
        b, t, l = chars.shape
        ids = chars.reshape(-1, l)
        h = self.conv(self.embed.embedding[...][ids])
        h = jnp.where(ids[..., None] == 0, -1e4, h)
        return h.max(axis=1).reshape(b, t, -1)


class FlaxTagger(nnx.Module):
    def __init__(self, vocab, num_chars, tags, word_dim=9, char_dim=6, filters=7, hidden=10, *, rngs):
        width = word_dim + filters
        self.words = nnx.Embed(vocab, word_dim, rngs=rngs)
        self.chars = CharEncoder(num_chars, char_dim, filters, rngs)
        self.hw_h = nnx.Linear(width, width, rngs=rngs)
        self.hw_t = nnx.Linear(width, width, rngs=rngs)
        self.fwd = GRUDirection(width, hidden, False, rngs)
        self.bwd = GRUDirection(width, hidden, True, rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.out = nnx.Linear(2 * hidden, tags, rngs=rngs)
        self.crf = LinearChainCRF(tags, rngs)

    def __call__(self, words, chars, tags, mask):
        x = jnp.concatenate([self.words.embedding[...][words], self.chars(chars)], axis=-1)
        t = nnx.sigmoid(self.hw_t(x))
        x = x + t * (nnx.relu(self.hw_h(x)) - x)
        y = jnp.concatenate([self.fwd(x), self.bwd(x)], axis=-1)
        emissions = self.out(self.drop(y))
        ll, best = self.crf(emissions, tags, mask)
        return emissions, ll, best


def port(net, model):
    arr = lambda p: jnp.asarray(p.detach().numpy())

    def dense(dst, weight, bias):
        dst.kernel[...] = arr(weight).T
        dst.bias[...] = arr(bias)

    model.words.embedding[...] = arr(net.word_embedding.weight)
    model.chars.embed.embedding[...] = arr(net.char_cnn.embedding.weight)
    model.chars.conv.kernel[...] = jnp.transpose(arr(net.char_cnn.conv.weight), (2, 1, 0))
    model.chars.conv.bias[...] = arr(net.char_cnn.conv.bias)
    dense(model.hw_h, net.highway.transform.weight, net.highway.transform.bias)
    dense(model.hw_t, net.highway.gate.weight, net.highway.gate.bias)
    for cell, suffix in ((model.fwd, ""), (model.bwd, "_reverse")):
        part = lambda name: getattr(net.gru, f"{name}_l0{suffix}")
        dense(cell.wi, part("weight_ih"), part("bias_ih"))
        dense(cell.wh, part("weight_hh"), part("bias_hh"))
    dense(model.out, net.hidden2tag.weight, net.hidden2tag.bias)
    model.crf.start[...] = arr(net.crf.start_transitions)
    model.crf.end[...] = arr(net.crf.end_transitions)
    model.crf.trans[...] = arr(net.crf.transitions)
    model.eval()
    return model


def build(seed):
    torch.manual_seed(seed)
    net = Tagger(vocab=21, num_chars=15, tags=5).eval()
    for name, p in net.named_parameters():
        if not name.startswith("crf"):
            nn.init.normal_(p, 0.0, 0.5)
    rng = np.random.default_rng(seed)
    lengths = np.array([8, 5, 3])
    mask = (np.arange(8) < lengths[:, None]).astype(np.int32)
    words = rng.integers(1, 21, (3, 8)) * mask
    chars = rng.integers(1, 15, (3, 8, 6))
    chars[..., 4:] *= rng.integers(0, 2, (3, 8, 1))
    tags = rng.integers(0, 5, (3, 8))
    model = port(net, FlaxTagger(21, 15, 5, rngs=nnx.Rngs(seed)))
    inputs = {"words": words, "chars": chars, "tags": tags, "mask": mask}
    return {"torch": net, "flax": model, "inputs": inputs}


FAULTS = [
    {
        "title": "recursion reduces over the next tag, not over the previous one",
        "edits": [("reduce(scores, axis=1), alpha)", "reduce(scores, axis=2), alpha)")],
        "layers": ["crf"],
        "causes": ["axis", "transposed"],
        "level": "outputs",
    },
    {
        "title": "end transition of the last position, padded or not",
        "edits": [("        last = mask.sum(axis=1).astype(int) - 1\n        last_tag = jnp.take_along_axis(tags, last[:, None], axis=1)[:, 0]\n", "        last_tag = tags[:, -1]\n")],
        "layers": ["crf"],
        "causes": ["token"],
        "level": "outputs",
    },
    {
        "title": "recursion goes on over the padding",
        "edits": [("            alpha = jnp.where(valid[:, None] > 0, reduce(scores, axis=1), alpha)\n", "            alpha = reduce(scores, axis=1)\n")],
        "layers": ["crf"],
        "causes": ["mask", "left_out"],
        "level": "outputs",
    },
    {
        "title": "stop_gradient on one of the two uses of logsumexp's maximum",
        "edits": [("+ jnp.squeeze(peak, axis)", "+ jax.lax.stop_gradient(jnp.squeeze(peak, axis))")],
        "layers": ["crf"],
        "causes": ["stop_gradient"],
        "level": "gradients",
    },
    {
        "title": "hidden bias of the new gate added outside the reset gate",
        "edits": [
            ("hr, hz, hnew = jnp.split(h @ kernel + bias, 3, axis=-1)", "hr, hz, hnew = jnp.split(h @ kernel, 3, axis=-1)\n            br, bz, bn = jnp.split(bias, 3)\n            hr, hz = hr + br, hz + bz"),
            ("n = jnp.tanh(inew + r * hnew)", "n = jnp.tanh(inew + bn + r * hnew)"),
        ],
        "layers": ["gru"],
        "causes": ["gru_bias"],
        "level": "outputs",
    },
    {
        "title": "outputs of the backward direction not turned round again",
        "edits": [("        if self.reverse:\n            ys = jnp.flip(ys, axis=1)\n", "")],
        "layers": ["gru"],
        "causes": ["reversed", "left_out"],
        "level": "outputs",
    },
    {
        "title": "highway carries by the gate and transforms by its complement",
        "edits": [("x = x + t * (nnx.relu(self.hw_h(x)) - x)", "h = nnx.relu(self.hw_h(x))\n        x = h + t * (x - h)")],
        "layers": ["highway"],
        "between": ("highway.gate", "gru"),
        "causes": ["operand", "swapped"],
        "level": "outputs",
    },
    {
        "title": "padding characters take part in the maximum",
        "edits": [("        h = jnp.where(ids[..., None] == 0, -1e4, h)\n", "")],
        "layers": ["char_cnn"],
        "between": ("char_cnn.conv", "highway.transform"),
        "causes": ["mask", "left_out"],
        "level": "outputs",
    },
    {
        "title": "dropout on the embeddings, not on the GRU's outputs",
        "edits": [("emissions = self.out(self.drop(y))", "emissions = self.out(y)"),
                  ("        t = nnx.sigmoid(self.hw_t(x))\n", "        x = self.drop(x)\n        t = nnx.sigmoid(self.hw_t(x))\n")],
        "layers": ["dropout"],
        "causes": ["training_attribute", "dropout"],
        "level": "attributes",
    },
]
