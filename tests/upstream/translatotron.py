"""Translatotron once more: one utterance, one step and one attention head at a time."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from upstream import Document, Upstream
from zoo.models.translatotron import MODEL
from zoo.models.translatotron.config import Config


class PlainRNN(nn.Module):
    """LSTM cells with zoneout, and additive attention, one head after another."""

    def __init__(self, c: Config, n_in: int, size: int, layers: int, units: int, heads: int):
        super().__init__()
        self.heads, self.zoneout = heads, c.zoneout
        self.cells = nn.ModuleList(
            nn.LSTMCell(size if i else n_in + units, size) for i in range(layers)
        )
        self.attention = nn.Module()
        self.attention.score = nn.Parameter(torch.zeros(heads, units // heads))
        self.attention.query = nn.Linear(size, units, bias=False)
        self.attention.key = nn.Linear(2 * c.encoder_size, units)
        self.attention.value = nn.Linear(2 * c.encoder_size, units)
        self.attention.out = nn.Linear(units, units)

    def attend(self, query: Any, memory: Any) -> Any:
        """One utterance: query (H,), memory (S, M) -> context (units,), weights (heads, S)."""
        a = self.attention
        q, k, v = (
            x.chunk(self.heads, -1) for x in (a.query(query), a.key(memory), a.value(memory))
        )
        weights = [((q[n] + k[n]).tanh() @ a.score[n]).softmax(0) for n in range(self.heads)]
        found = [w @ values for w, values in zip(weights, v, strict=True)]
        return a.out(torch.cat(found)), torch.stack(weights)

    def forward(self, inputs: Any, memory: Any) -> Any:
        """One utterance: (T, n_in), (S, M) -> (T, H + units), weights (T, heads, S)."""
        zeros = memory.new_zeros
        states = [(zeros(cell.hidden_size), zeros(cell.hidden_size)) for cell in self.cells]
        context = zeros(self.attention.out.out_features)
        made, attended = [], []
        for x in inputs:
            x = torch.cat([x, context])
            for i, cell in enumerate(self.cells):
                new = cell(x[None], tuple(s[None] for s in states[i]))
                z = self.zoneout
                states[i] = tuple(
                    z * s + (1 - z) * n[0] for s, n in zip(states[i], new, strict=True)
                )
                x = states[i][0]
            context, weights = self.attend(x, memory)
            made.append(torch.cat([x, context]))
            attended.append(weights)
        return torch.stack(made), torch.stack(attended)


class Plain(nn.Module):
    """The model in eval mode, one utterance at a time, with nothing of the zoo in it."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        H, D, A = c.encoder_size, c.decoder_size, c.attention_size
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            nn.LSTM(2 * H if i else c.mel_channels, H, bidirectional=True)
            for i in range(c.encoder_layers)
        )
        d = self.decoder = nn.Module()
        d.prenet = nn.Module()
        d.prenet.fc1 = nn.Linear(c.frame_size, c.prenet_size)
        d.prenet.fc2 = nn.Linear(c.prenet_size, c.prenet_size)
        d.rnn = PlainRNN(c, c.prenet_size, D, c.decoder_layers, A, c.attention_heads)
        d.frame = nn.Linear(D + A, c.reduction * c.frame_size)
        d.stop = nn.Linear(D + A, 1)
        inner = [c.postnet_size] * (c.postnet_layers - 1)
        widths = [c.frame_size, *inner, c.frame_size]
        self.postnet = nn.Module()
        self.postnet.convs = nn.ModuleList(
            nn.Conv1d(n, m, c.postnet_kernel, padding="same", bias=False)
            for n, m in itertools.pairwise(widths)
        )
        self.postnet.norms = nn.ModuleList(nn.BatchNorm1d(m) for m in widths[1:])
        size = c.auxiliary_size
        for name, symbols in (("source", c.source_phonemes), ("target", c.target_phonemes)):
            if symbols:
                decoder = nn.Module()
                decoder.embedding = nn.Embedding(symbols, size)
                decoder.rnn = PlainRNN(c, size, size, c.auxiliary_layers, size, 1)
                decoder.output = nn.Linear(2 * size, symbols)
                setattr(self, f"{name}_decoder", decoder)
        self.eval()

    def forward(self, **given: Any) -> dict[str, Any]:
        B = len(given["source"])
        parts = [self.one(**{n: x[b] for n, x in given.items()}) for b in range(B)]
        return {n: torch.stack([p[n] for p in parts]) for n in parts[0]}

    def one(self, source: Any, target: Any, source_lengths: Any, **phonemes: Any) -> dict[str, Any]:
        c, d = self.c, self.decoder
        x = source[:source_lengths]
        layers = []
        for lstm in self.encoder.layers:
            x, _ = lstm(x)
            layers.append(x)
        groups = target.reshape(-1, c.reduction, c.frame_size)
        last = torch.cat([torch.zeros_like(groups[:1, -1]), groups[:-1, -1]])
        y, weights = d.rnn(d.prenet.fc2(d.prenet.fc1(last).relu()).relu(), x)
        beyond = (0, len(source) - source_lengths)  # frames that are padding have no weight
        before = d.frame(y).reshape(target.shape)
        z = before.T[None]
        for i, (conv, norm) in enumerate(zip(self.postnet.convs, self.postnet.norms, strict=True)):
            z = norm(conv(z))
            z = z.tanh() if i + 1 < c.postnet_layers else z
        found = {"frames": before + z[0].T, "frames_before": before, "stop": d.stop(y)[:, 0]}
        found["attention_weights"] = pad(weights, beyond)
        for name, layer in (("source", c.source_layer), ("target", c.target_layer)):
            if f"{name}_phonemes" in phonemes:
                decoder = getattr(self, f"{name}_decoder")
                x = decoder.embedding(phonemes[f"{name}_phonemes"])
                y, weights = decoder.rnn(x, layers[layer - 1])
                found[f"{name}_logits"] = decoder.output(y)
                found[f"{name}_attention_weights"] = pad(weights, beyond)
        return found


SMALL = MODEL.presets["translatotron_small"]

UPSTREAM = Upstream(
    Plain,
    lambda module, given: module(**given),
    documents={"translatotron_small": Document(SMALL, lambda: Plain(SMALL))},
)
