"""Recurrent nets in Flax NNX: the twin of model_torch.py, class by class.

T steps of B sequences, F features of a step, O outputs. Sequences are (T, B, F) in time-major
order, (B, T, F) where the config says `batch_first`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from zoo.models.recurrent.config import Config
from zoo.nn.recurrent_flax import GRU, LSTM, RNN
from zoo.nn.taps import Taps


class _Net(nnx.Module):
    """The part below the linear layers: an embedding if there are ids, and the recurrent net."""

    def __init__(self, c: Config, **kw: Any) -> None:
        self.cell = c.cell
        size = c.input_size, c.hidden_size, c.num_layers
        options = {"batch_first": c.batch_first, "bidirectional": c.bidirectional, **kw}
        self.embedding = (
            nnx.Embed(c.vocab_size, c.input_size, **kw) if c.vocab_size is not None else None
        )
        # The attribute is called rnn, lstm or gru because checkpoints have that name.
        if c.cell == "rnn":
            self.rnn = RNN(*size, nonlinearity=c.nonlinearity, **options)
        elif c.cell == "lstm":
            self.lstm = LSTM(*size, **options)
        else:
            self.gru = GRU(*size, **options)

    def run(self, x: Array, lengths: Array | None, tap: Taps) -> tuple[Array, Array]:
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
        self.fc = nnx.Linear(c.features, c.output_size, **kw)

    def __call__(self, x: Array, lengths: Array | None = None, taps: bool = False) -> Any:
        """Features (T, B, F) or ids (T, B) -> (B, O), with batch_first from (B, T, F) or (B, T).

        `lengths` (B,), from 1 to T, are those of sequences that end early; None: all are whole.
        `taps=True` returns (output, {name: intermediate}); names are module paths.
        """
        tap = Taps(taps)
        _, h = self.run(x, lengths, tap)
        last = jnp.concatenate(list(h[-self.directions :]), axis=-1)  # forward, then reverse
        return tap.result(self.fc(last))


class SequenceTagger(_Net):
    """`fc1` and `fc2` on every step, a ReLU before each."""

    def __init__(self, c: Config, **kw: Any) -> None:
        super().__init__(c, **kw)
        self.fc1 = nnx.Linear(c.features, c.fc_size, **kw)
        self.fc2 = nnx.Linear(c.fc_size, c.output_size, **kw)

    def __call__(self, x: Array, lengths: Array | None = None, taps: bool = False) -> Any:
        """As SequenceRegressor takes it -> (T, B, O), with batch_first (B, T, O)."""
        tap = Taps(taps)
        outputs, _ = self.run(x, lengths, tap)
        y = tap("fc1", self.fc1(jax.nn.relu(outputs)))
        return tap.result(self.fc2(jax.nn.relu(y)))


def build(c: Config, **kw: Any) -> nnx.Module:
    """The module for `c.head`. `dtype` is that of the computation, `param_dtype` of the weights;
    `rngs` is required, as everywhere in NNX."""
    return SequenceRegressor(c, **kw) if c.head == "last" else SequenceTagger(c, **kw)
