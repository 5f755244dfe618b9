"""Recurrent nets in PyTorch. Names and shapes are those of the documents' own classes.

T steps of B sequences, F features of a step, O outputs. Sequences are (T, B, F) in time-major
order, (B, T, F) where the config says `batch_first`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        order = {"batch_first": c.batch_first, "bidirectional": c.bidirectional, **kw}
        if c.vocab_size is not None:
            self.embedding = Embedding(c.vocab_size, c.input_size, **kw)
        if c.cell == "rnn":
            self.rnn = RNN(*size, nonlinearity=c.nonlinearity, **order)
        elif c.cell == "lstm":
            self.lstm = LSTM(*size, **order)
        else:
            self.gru = GRU(*size, **order)

    def run(self, x: Tensor, lengths: Tensor | None, tap: Taps) -> tuple[Tensor, Tensor]:
        """Outputs of every step, and the final states h of every layer and direction."""
        if hasattr(self, "embedding"):
            x = tap("embedding", self.embedding(x))
        net = getattr(self, self.cell)
        outputs, state = net(x, lengths=lengths)
        return tap(self.cell, outputs), state[0] if self.cell == "lstm" else state


class SequenceRegressor(_Net):
    """`fc` on the last layer's final state: in one direction, its output at the last step."""

    def __init__(self, c: Config, **kw: Any) -> None:
        super().__init__(c, **kw)
        self.directions = 1 + c.bidirectional
        self.fc = Linear(c.features, c.output_size, **kw)

    def forward(self, x: Tensor, lengths: Tensor | None = None, taps: bool = False) -> Any:
        """Features (T, B, F) or ids (T, B) -> (B, O), with batch_first from (B, T, F) or (B, T).

        `lengths` (B,), from 1 to T, are those of sequences that end early; None: all are whole.
        `taps=True` gives (output, {module path: intermediate}).
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
        y = tap("fc1", self.fc1(F.relu(outputs)))
        return tap.result(self.fc2(F.relu(y)))


def recurrent(c: Config, **kw: Any) -> nn.Module:
    """The module for `c.head`. `dtype` is that of the computation, `param_dtype` of the weights."""
    return SequenceRegressor(c, **kw) if c.head == "last" else SequenceTagger(c, **kw)
