"""Recurrent nets in Flax NNX: the twin of model_torch.py, class by class.

T steps of B sequences, F features of a step, H hidden units, O outputs; L layers of D directions
(1 or 2). Sequences are (T, B, F), or (B, T, F) where the config says `batch_first`.
"""

from __future__ import annotations

from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn import relu

from zoo.models.recurrent.config import Config
from zoo.nn.options_flax import Options
from zoo.nn.recurrent_flax import GRU, LSTM, RNN, RecurrentOptions


class _Net(nnx.Module):
    """What comes before the linear layers: an embedding, for ids, and the recurrent net."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.cell = c.cell
        self.embedding = (
            nnx.Embed(c.vocab_size, c.input_size, **kw) if c.vocab_size is not None else None
        )
        sizes = c.input_size, c.hidden_size, c.num_layers
        options: RecurrentOptions = {
            "batch_first": c.batch_first,
            "bidirectional": c.bidirectional,
            "dropout": 0.0,
            **kw,
        }
        # The attribute is rnn, lstm or gru, as in the published checkpoints.
        if c.cell == "rnn":
            self.rnn = RNN(*sizes, nonlinearity=c.nonlinearity, **options)
        elif c.cell == "lstm":
            self.lstm = LSTM(*sizes, **options)
        else:
            self.gru = GRU(*sizes, **options)

    def run(self, x: Array, lengths: Array | None) -> tuple[Array, Array]:
        """Outputs of every step, (T, B, D*H) or (B, T, D*H), and the final states h (L*D, B, H)."""
        if self.embedding is not None:
            x = self.embedding(x)
        outputs, state = getattr(self, self.cell)(x, lengths=lengths)
        h = state[0] if self.cell == "lstm" else state  # the state of an LSTM is (h, c)
        return outputs, h


class SequenceRegressor(_Net):
    """`fc` on the last layer's final state, of both directions where there are two."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__(c, **kw)
        self.directions = 1 + c.bidirectional
        self.fc = nnx.Linear(c.features, c.output_size, **kw)

    def __call__(self, x: Array, lengths: Array | None = None) -> Array:
        """Features (T, B, F) or ids (T, B) -> (B, O); with batch_first, (B, T, F) or (B, T).

        `lengths` (B,), from 1 to T, say where each sequence ends; None: at T.
        """
        _, h = self.run(x, lengths)
        last = jnp.concatenate(list(h[-self.directions :]), axis=-1)  # (B, D*H): forward, reverse
        return self.fc(last)


class SequenceTagger(_Net):
    """`fc1` and `fc2` on the outputs of every step, with a ReLU before each."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__(c, **kw)
        self.fc1 = nnx.Linear(c.features, c.fc_size, **kw)
        self.fc2 = nnx.Linear(c.fc_size, c.output_size, **kw)

    def __call__(self, x: Array, lengths: Array | None = None) -> Array:
        """Takes what SequenceRegressor takes -> (T, B, O); with batch_first, (B, T, O)."""
        outputs, _ = self.run(x, lengths)
        x = self.fc1(relu(outputs))
        return self.fc2(relu(x))


def build(c: Config, **kw: Unpack[Options]) -> SequenceRegressor | SequenceTagger:
    """The module for `c.head`."""
    return SequenceRegressor(c, **kw) if c.head == "last" else SequenceTagger(c, **kw)
