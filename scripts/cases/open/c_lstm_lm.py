"""A word language model: two nn.LSTM layers, carried state, tied head with a bias; Linen nn.RNN on the Flax side."""
from typing import Sequence

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


class RNNModel(nn.Module):
    """Container module with an encoder, a recurrent module, and a decoder (time first)."""

    def __init__(self, ntoken=21, nhid=12, nlayers=2, dropout=0.25, tie_weights=True):
        super().__init__()
        self.ntoken = ntoken
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(ntoken, nhid)
        self.rnn = nn.LSTM(nhid, nhid, nlayers, dropout=dropout)
        self.decoder = nn.Linear(nhid, ntoken)
        if tie_weights:
            self.decoder.weight = self.encoder.weight

    def forward(self, data, targets, h0, c0):
        emb = self.drop(self.encoder(data))
        output, (h, c) = self.rnn(emb, (h0, c0))
        decoded = self.decoder(self.drop(output)).view(-1, self.ntoken)
        logp = F.log_softmax(decoded, dim=1)
        loss = F.nll_loss(logp, targets.reshape(-1), ignore_index=0)
        return logp, loss, h, c


class LanguageModel(linen.Module):
    vocab: int = 21
    hidden: int = 12
    layers: int = 2
    dropout: float = 0.25

    @linen.compact
    def __call__(self, data, targets, h0, c0, deterministic: bool = True):
        embed = linen.Embed(self.vocab, self.hidden, name="embed")
        x = embed(data)
        x = linen.Dropout(self.dropout)(x, deterministic=deterministic)
        hs, cs = [], []
        for i in range(self.layers):
            cell = linen.OptimizedLSTMCell(self.hidden, name=f"lstm_{i}")
            rnn = linen.RNN(cell, time_major=True, return_carry=True, name=f"rnn_{i}")
            (c, h), x = rnn(x, initial_carry=(c0[i], h0[i]))
            if i + 1 < self.layers:
                x = linen.Dropout(self.dropout)(x, deterministic=deterministic)
            hs.append(h)
            cs.append(c)
        x = linen.Dropout(self.dropout)(x, deterministic=deterministic)
        bias = self.param("head_bias", linen.initializers.zeros, (self.vocab,))
        logits = embed.attend(x) + bias
        logp = jax.nn.log_softmax(logits.reshape(-1, self.vocab), axis=-1)
        target = targets.reshape(-1)
        nll = -jnp.take_along_axis(logp, target[:, None], axis=1)[:, 0]
        keep = target != 0
        loss = jnp.sum(nll * keep) / jnp.sum(keep)
        return logp, loss, jnp.stack(hs), jnp.stack(cs)


def convert_lstm(sd, layer):
    """One layer of torch's LSTM as OptimizedLSTMCell: one kernel per gate, one bias (on the hidden side)."""
    cell = {}
    gates: Sequence[str] = "ifgo"
    w_ih = np.split(sd[f"rnn.weight_ih_l{layer}"], 4)
    w_hh = np.split(sd[f"rnn.weight_hh_l{layer}"], 4)
    bias = np.split(sd[f"rnn.bias_ih_l{layer}"] + sd[f"rnn.bias_hh_l{layer}"], 4)
    for gate, wi, wh, b in zip(gates, w_ih, w_hh, bias):
        cell[f"i{gate}"] = {"kernel": wi.T}
        cell[f"h{gate}"] = {"kernel": wh.T, "bias": b}
    return cell


def port(net):
    sd = {k: v.detach().double().numpy() for k, v in net.state_dict().items()}
    params = {"embed": {"embedding": sd["encoder.weight"]}, "head_bias": sd["decoder.bias"]}
    for i in range(2):
        params[f"lstm_{i}"] = convert_lstm(sd, i)
    return {"params": jax.tree.map(jnp.asarray, params)}


def build(seed):
    """The right pair with random weights and inputs that follow from the seed."""
    torch.manual_seed(seed)
    net = RNNModel().eval()
    for p in net.parameters():
        nn.init.uniform_(p, -0.7, 0.7)
    rng = np.random.default_rng(seed)
    text = rng.integers(1, 21, size=(8, 3))
    targets = text[1:].copy()
    targets[5:, 1] = 0
    h0, c0 = rng.normal(size=(2, 2, 3, 12)).astype(np.float32)
    return {"torch": net, "flax": (LanguageModel(), port(net)), "inputs": (text[:-1], targets, h0, c0)}


FAULTS = [
    {
        "title": "state handed to the Flax cell as (h, c)",
        "edits": [("initial_carry=(c0[i], h0[i])", "initial_carry=(h0[i], c0[i])")],
        "layers": ["rnn", ""],
        "causes": ["swapped"],
        "level": "outputs",
    },
    {
        "title": "log probabilities flattened batch first",
        "edits": [("jax.nn.log_softmax(logits.reshape(-1, self.vocab), axis=-1)",
                   "jax.nn.log_softmax(logits.swapaxes(0, 1).reshape(-1, self.vocab), axis=-1)")],
        "layers": [""],
        "between": ("decoder", None),
        "causes": ["rearranged", "transposed"],
        "level": "outputs",
    },
    {
        "title": "loss averaged over ignored tokens too",
        "edits": [("loss = jnp.sum(nll * keep) / jnp.sum(keep)", "loss = jnp.mean(nll * keep)")],
        "layers": [""],
        "between": ("decoder", None),
        "causes": ["operation", "mask", "constant"],
        "level": "outputs",
    },
    {
        "title": "Keras' hard sigmoid in the gates",
        "edits": [("linen.OptimizedLSTMCell(self.hidden, name=f\"lstm_{i}\")", "linen.OptimizedLSTMCell(self.hidden, gate_fn=linen.hard_sigmoid, name=f\"lstm_{i}\")")],
        "layers": ["rnn"],
        "causes": ["activation"],
        "level": "outputs",
    },
    {
        "title": "one added to the forget gate's bias",
        "edits": [("    for gate, wi, wh, b in zip(gates, w_ih, w_hh, bias):\n", "    bias[1] = bias[1] + 1.0\n    for gate, wi, wh, b in zip(gates, w_ih, w_hh, bias):\n")],
        "layers": ["rnn"],
        "causes": ["forget_bias"],
        "level": "outputs",
    },
    {
        "title": "square hidden kernels not transposed",
        "edits": [("cell[f\"h{gate}\"] = {\"kernel\": wh.T, \"bias\": b}", "cell[f\"h{gate}\"] = {\"kernel\": wh, \"bias\": b}")],
        "layers": ["rnn"],
        "causes": ["transposed"],
        "level": "outputs",
    },
    {
        "title": "head is a Dense of its own, with a copy of the embedding",
        "edits": [("        bias = self.param(\"head_bias\", linen.initializers.zeros, (self.vocab,))\n        logits = embed.attend(x) + bias\n",
                   "        logits = linen.Dense(self.vocab, name=\"head\")(x)\n"),
                  ("\"head_bias\": sd[\"decoder.bias\"]}", "\"head\": {\"kernel\": sd[\"decoder.weight\"].T, \"bias\": sd[\"decoder.bias\"]}}")],
        "layers": ["decoder", "encoder"],
        "causes": ["tied"],
        "level": "gradients",
    },
    {
        "title": "no dropout between the LSTM layers",
        "edits": [("            if i + 1 < self.layers:\n                x = linen.Dropout(self.dropout)(x, deterministic=deterministic)\n", "")],
        "layers": ["rnn"],
        "causes": ["training_attribute"],
        "level": "attributes",
    },
]
