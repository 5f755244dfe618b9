"""Hyper-parameters of the recurrent nets, and the published sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Cell = Literal["rnn", "lstm", "gru"]
Head = Literal["last", "every"]

GATES: dict[Cell, int] = {"rnn": 1, "lstm": 4, "gru": 3}


@dataclass(frozen=True)
class Config:
    """Defaults are those of `lstm_regressor`."""

    cell: Cell = "lstm"  # also the attribute's name
    input_size: int = 10  # features of a step: those given, or those of the embedding
    hidden_size: int = 50
    num_layers: int = 1
    bidirectional: bool = False
    nonlinearity: Literal["tanh", "relu"] = "tanh"  # of cell "rnn"
    batch_first: bool = False  # (B, T, ...), else (T, B, ...)
    vocab_size: int | None = None  # ids through an embedding; None: features as they are
    head: Head = "last"  # `fc` on the last layer's final state, or `fc1`, `fc2` on every step
    fc_size: int = 10  # between `fc1` and `fc2`
    output_size: int = 1

    def __post_init__(self) -> None:
        if self.cell not in GATES:
            raise ValueError(f"cell {self.cell!r} is none of {', '.join(GATES)}")
        if self.head not in ("last", "every"):
            raise ValueError(f"head {self.head!r} is neither 'last' nor 'every'")
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity {self.nonlinearity!r} is neither tanh nor relu")

    @property
    def features(self) -> int:
        """What the recurrent net gives for a step."""
        return self.hidden_size * (1 + self.bidirectional)


_LSTM = Config()

PRESETS = {
    "rnn_regressor": replace(_LSTM, cell="rnn"),
    "lstm_regressor": _LSTM,
    "lstm_tagger": replace(_LSTM, hidden_size=10, head="every", output_size=10),
    "imdb_rnn": Config(
        cell="rnn",
        input_size=100,
        hidden_size=128,
        num_layers=2,
        batch_first=True,
        vocab_size=25002,
    ),
}

_TINY = Config(input_size=3, hidden_size=4, output_size=2)
TINY = {
    "rnn": replace(_TINY, cell="rnn"),
    "lstm": replace(_TINY, num_layers=2),
    "gru": replace(_TINY, cell="gru", bidirectional=True, batch_first=True),
    "tagger": replace(_TINY, head="every", fc_size=5),
    "ids": replace(
        _TINY, cell="rnn", num_layers=2, nonlinearity="relu", batch_first=True, vocab_size=20
    ),
}
