"""The documents' recurrent models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from upstream import Document, Upstream
from zoo import probe
from zoo.models.recurrent import MODEL


class RNNRegressor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(10, 50)
        self.fc = nn.Linear(50, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h0 = torch.zeros(1, x.size(1), 50)
        out, _ = self.rnn(x, h0)
        return self.fc(out[-1, :, :])


class LSTMRegressor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(10, 50)
        self.fc = nn.Linear(50, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(1, x.size(1), 50)
        out, _ = self.lstm(x, (zeros, zeros))
        return self.fc(out[-1, :, :])


class LSTMTagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(10, 10)
        self.fc1 = nn.Linear(10, 10)
        self.fc2 = nn.Linear(10, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.lstm(x)
        x = F.relu(x)
        x = F.relu(self.fc1(x))
        return self.fc2(x)


class ImdbRNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(25002, 100)
        self.rnn = nn.RNN(100, 128, num_layers=2, batch_first=True)
        self.fc = nn.Linear(128, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, hidden = self.rnn(self.embedding(x))
        return self.fc(hidden[-1])


CLASSES = {
    "rnn_regressor": RNNRegressor,
    "lstm_regressor": LSTMRegressor,
    "lstm_tagger": LSTMTagger,
    "imdb_rnn": ImdbRNN,
}

WORDS = {"x": probe.integers("x", (2, 7), 25002)}  # without lengths, which the class does not take

UPSTREAM = Upstream(
    documents={
        n: Document(MODEL.presets[n], cls, WORDS if cls is ImdbRNN else None)
        for n, cls in CLASSES.items()
    }
)
