"""Recurrent nets in PyTorch. Names are those of the published checkpoints.

T steps of B sequences, F features of a step, O outputs. Sequences are (T, B, F) in time-major
order, (B, T, F) where the config says `batch_first`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn, relu

from zoo.models.recurrent.config import Config
from zoo.nn.layers_torch import Embedding, Linear
from zoo.nn.recurrent_torch import GRU, LSTM, RNN
from zoo.nn.taps import Taps


class _Net(nn.Module):
    """The part below the linear layers: an embedding if there are ids, and the recurrent net."""

    def __init__(self, c: Config, **kw: Any) -> None:
        super().__init__()
        self.cell = c.cell
        size = c.input_size, c.hidden_size, c.num_layers
        options = {"batch_first": c.batch_first, "bidirectional": c.bidirectional, **kw}
        self.embedding = (
            Embedding(c.vocab_size, c.input_size, **kw) if c.vocab_size is not None else None
        )
        # The attribute is called rnn, lstm or gru because checkpoints have that name.
        if c.cell == "rnn":
            self.rnn = RNN(*size, nonlinearity=c.nonlinearity, **options)
        elif c.cell == "lstm":
            self.lstm = LSTM(*size, **options)
        else:
            self.gru = GRU(*size, **options)

    def run(self, x: Tensor, lengths: Tensor | None, tap: Taps) -> tuple[Tensor, Tensor]:
        """Outputs of every step, and the final states h of every layer and direction."""
        if self.embedding is not None:
            x = tap("embedding", self.embedding(x))
        net = getattr(self, self.cell)
        outputs, state = net(x, lengths=lengths)
        h = state[0] if self.cell == "lstm" else state  # an LSTM's state is (h, c)
        return tap(self.cell, outputs), h


class SequenceRegressor(_Net):
    """`fc` on the last layer's final state: in one direction, its output at the last step."""

    def __init__(self, c: Config, **kw: Any) -> None:
        super().__init__(c, **kw)
        self.directions = 1 + c.bidirectional
        self.fc = Linear(c.features, c.output_size, **kw)

    def forward(self, x: Tensor, lengths: Tensor | None = None, taps: bool = False) -> Any:
        """Features (T, B, F) or ids (T, B) -> (B, O), with batch_first from (B, T, F) or (B, T).

        `lengths` (B,), from 1 to T, are those of sequences that end early; None: all are whole.
        `taps=True` returns (output, {name: intermediate}); names are module paths.
        """
        tap = Taps(taps)
        _, h = self.run(x, lengths, tap)
        last = torch.cat(list(h[-self.directions :]), dim=-1)  # forward, then reverse
        return tap.result(self.fc(last))


class SequenceTagger(_Net):
    """`fc1` and `fc2` on every step, a ReLU before each."""

    def __init__(self, c: Config, **kw: Any) -> None:
        super().__init__(c, **kw)
        self.fc1 = Linear(c.features, c.fc_size, **kw)
        self.fc2 = Linear(c.fc_size, c.output_size, **kw)

    def forward(self, x: Tensor, lengths: Tensor | None = None, taps: bool = False) -> Any:
        """As SequenceRegressor takes it -> (T, B, O), with batch_first (B, T, O)."""
        tap = Taps(taps)
        outputs, _ = self.run(x, lengths, tap)
        y = tap("fc1", self.fc1(relu(outputs)))
        return tap.result(self.fc2(relu(y)))


def build(c: Config, **kw: Any) -> nn.Module:
    """The module for `c.head`. `dtype` is that of the computation, `param_dtype` of the weights."""
    return SequenceRegressor(c, **kw) if c.head == "last" else SequenceTagger(c, **kw)
