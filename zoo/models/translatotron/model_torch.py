"""Translatotron in PyTorch. Jia 2019, https://arxiv.org/abs/1904.06037.

B utterances of S source frames with C mel channels and T target frames with F bins, of which the
decoder predicts r at a step; H units in an LSTM, A in an attention; L phonemes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.models.translatotron.config import Config, Output, Translation
from zoo.nn.additive_attention_torch import AdditiveAttention, Memory
from zoo.nn.batchnorm_torch import BatchNorm1d
from zoo.nn.conv_torch import Conv1d
from zoo.nn.layers_torch import Embedding, Linear
from zoo.nn.recurrent_torch import LSTM, LSTMCell
from zoo.nn.taps import Taps


class State(NamedTuple):
    """What an attentive LSTM carries from one step to the next."""

    cells: tuple[tuple[Tensor, Tensor], ...]  # (h, c) of each layer, each (B, H)
    context: Tensor  # (B, A), what was attended to


class Masks(NamedTuple):
    """Random numbers of all T steps, drawn beforehand; ones and constants outside of training."""

    update: Tensor  # (T, layers, 2, B, H) of zoneout: 1 takes the new h or c, 0 keeps the old
    attention: Tensor  # (T, B, N, S), the dropout on attention weights


class Encoder(nn.Module):
    """Bidirectional LSTMs, one on the other."""

    def __init__(self, c: Config, **kw: Any) -> None:
        super().__init__()
        widths = [c.mel_channels] + [2 * c.encoder_size] * (c.encoder_layers - 1)
        self.layers = nn.ModuleList(
            LSTM(n, c.encoder_size, batch_first=True, bidirectional=True, **kw) for n in widths
        )
        self.dropout = nn.Dropout(c.dropout_prob)

    def forward(self, x: Tensor, lengths: Tensor | None, tap: Taps) -> list[Tensor]:
        """x (B, S, C) -> the outputs of every layer, (B, S, 2H) each."""
        outputs = []
        for i, layer in enumerate(self.layers):
            x, _ = layer(x, lengths=lengths)
            x = tap(f"layers.{i}", self.dropout(x))
            outputs.append(x)
        return outputs


class PreNet(nn.Module):
    """The bottleneck through which the decoder sees its own last frame."""

    def __init__(self, c: Config, **kw: Any) -> None:
        super().__init__()
        self.fc1 = Linear(c.frame_size, c.prenet_size, **kw)
        self.fc2 = Linear(c.prenet_size, c.prenet_size, **kw)
        self.dropout = nn.Dropout(c.prenet_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., F) -> (..., prenet_size)."""
        x = self.dropout(F.relu(self.fc1(x)))
        return self.dropout(F.relu(self.fc2(x)))


class AttentiveLSTM(nn.Module):
    """LSTM layers that read an input beside what was attended to last, and whose top asks next.

    Zoneout (Krueger 2016): in training h and c stay as they were with this probability, each by
    itself; otherwise they move by what is expected of that, (1 - zoneout) of the way.
    """

    def __init__(
        self, c: Config, n_in: int, size: int, layers: int, attention: int, heads: int, **kw: Any
    ) -> None:
        super().__init__()
        self.size = size
        self.attention_size = attention
        self.keep = 1 - c.zoneout
        widths = [n_in + attention] + [size] * (layers - 1)
        self.cells = nn.ModuleList(LSTMCell(n, size, **kw) for n in widths)
        self.attention = AdditiveAttention(size, 2 * c.encoder_size, attention, heads, **kw)
        self.zoneout = nn.Dropout(c.zoneout)
        self.dropout = nn.Dropout(c.attention_dropout)

    def forward(self, x: Tensor, memory: Memory, tap: Taps) -> Tensor:
        """All inputs (B, T, n_in) -> [h of the top, context] at every step, (B, T, H + A)."""
        masks = self.masks(x.shape[1], memory)
        state = self.start(memory)
        tops, contexts, weights = [], [], []
        for t in range(x.shape[1]):
            state, w = self.step(x[:, t], state, memory, Masks(*(m[t] for m in masks)))
            tops.append(state.cells[-1][0])
            contexts.append(state.context)
            weights.append(w)
        top = tap("cells", torch.stack(tops, 1))
        context = tap("attention", torch.stack(contexts, 1))
        tap("attention.weights", torch.stack(weights, 1))
        return torch.cat([top, context], -1)

    def step(self, x: Tensor, state: State, memory: Memory, masks: Masks) -> tuple[State, Tensor]:
        """x (B, n_in), masks of this step -> the next state, and the weights (B, N, S)."""
        x = torch.cat([x, state.context], -1)
        cells = []
        for cell, (h, c), update in zip(self.cells, state.cells, masks.update, strict=True):
            new_h, new_c = cell(x, (h, c))
            x = h + update[0] * (new_h - h)
            cells.append((x, c + update[1] * (new_c - c)))
        context, weights = self.attention(x, memory, masks.attention)
        return State(tuple(cells), context), weights

    def start(self, memory: Memory) -> State:
        """The state before the first step: zeros."""
        zeros = memory.keys.new_zeros(memory.keys.shape[0], self.size)
        context = memory.keys.new_zeros(memory.keys.shape[0], self.attention_size)
        return State(tuple((zeros, zeros) for _ in self.cells), context)

    def masks(self, steps: int, memory: Memory) -> Masks:
        """Masks of so many steps, of length 1 in every other axis outside of training."""
        B, S, N, _ = memory.keys.shape
        batch, size, weights = (B, self.size, (B, N, S)) if self.training else (1, 1, (1, 1, 1))
        ones = memory.keys.new_ones(steps, len(self.cells), 2, batch, size)
        update = self.keep * self.zoneout(ones)
        return Masks(update, self.dropout(memory.keys.new_ones(steps, *weights)))


class SpectrogramDecoder(nn.Module):
    """Tacotron 2's decoder, r frames at a step."""

    def __init__(self, c: Config, **kw: Any) -> None:
        super().__init__()
        self.reduction = c.reduction
        self.frame_size = c.frame_size
        A = c.attention_size
        self.prenet = PreNet(c, **kw)
        self.rnn = AttentiveLSTM(
            c, c.prenet_size, c.decoder_size, c.decoder_layers, A, c.attention_heads, **kw
        )
        self.frame = Linear(c.decoder_size + A, c.reduction * c.frame_size, **kw)
        self.stop = Linear(c.decoder_size + A, 1, **kw)

    def forward(self, target: Tensor, memory: Memory, tap: Taps) -> tuple[Tensor, Tensor]:
        """target (B, T, F), which is shifted here -> frames (B, T, F), stop logits (B, T / r)."""
        last = target[:, self.reduction - 1 :: self.reduction]  # of every step
        before = F.pad(last[:, :-1], (0, 0, 1, 0))
        x = tap("prenet", self.prenet(before))
        y = self.rnn(x, memory, tap.at("rnn"))
        return self.frame(y).reshape(target.shape), self.stop(y)[..., 0]

    def decode(self, memory: Memory, steps: int) -> tuple[Tensor, Tensor]:
        """Every step from the last frame of the one before: frames (B, steps * r, F), stop."""
        B = memory.keys.shape[0]
        masks = self.rnn.masks(steps, memory)
        state = self.rnn.start(memory)
        last = memory.keys.new_zeros(B, self.frame_size)
        frames, stops = [], []
        for t in range(steps):
            state, _ = self.rnn.step(
                self.prenet(last), state, memory, Masks(*(m[t] for m in masks))
            )
            y = torch.cat([state.cells[-1][0], state.context], -1)
            frame = self.frame(y).view(B, self.reduction, -1)
            last = frame[:, -1]
            frames.append(frame)
            stops.append(self.stop(y))
        return torch.cat(frames, 1), torch.cat(stops, 1)


class PostNet(nn.Module):
    """Convolutions over time that correct all frames once they are there."""

    def __init__(self, c: Config, **kw: Any) -> None:
        super().__init__()
        k = c.postnet_kernel
        self.convs = nn.ModuleList(
            Conv1d(n, m, k, padding=k // 2, bias=False, **kw) for n, m in c.postnet_widths
        )
        self.norms = nn.ModuleList(BatchNorm1d(m, **kw) for _, m in c.postnet_widths)
        self.dropout = nn.Dropout(c.postnet_dropout)

    def forward(self, frames: Tensor, tap: Taps) -> Tensor:
        """frames (B, T, F) -> what to add to them."""
        x = frames.transpose(1, 2)
        last = len(self.convs) - 1
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = tap(f"convs.{i}", conv(x))
            x = tap(f"norms.{i}", norm(x))
            x = self.dropout(x if i == last else torch.tanh(x))
        return x.transpose(1, 2)


class PhonemeDecoder(nn.Module):
    """An auxiliary decoder: the phonemes of one language, each from those before it."""

    def __init__(self, c: Config, symbols: int, **kw: Any) -> None:
        super().__init__()
        size = c.auxiliary_size
        self.embedding = Embedding(symbols, size, **kw)
        self.rnn = AttentiveLSTM(c, size, size, c.auxiliary_layers, size, 1, **kw)
        self.output = Linear(2 * size, symbols, **kw)

    def forward(self, phonemes: Tensor, encoded: Tensor, mask: Tensor, tap: Taps) -> Tensor:
        """phonemes (B, L), the first of them a start symbol -> logits (B, L, symbols)."""
        memory = self.rnn.attention.memory(encoded, mask)
        return self.output(self.rnn(self.embedding(phonemes), memory, tap.at("rnn")))


class Translatotron(nn.Module):
    """Speech to speech, with the phonemes of both sides as a help in training."""

    def __init__(self, c: Config, **kw: Any) -> None:
        super().__init__()
        self.config = c
        self.encoder = Encoder(c, **kw)
        self.decoder = SpectrogramDecoder(c, **kw)
        self.postnet = PostNet(c, **kw)
        self.source_decoder, self.target_decoder = (
            PhonemeDecoder(c, n, **kw) if n else None
            for n in (c.source_phonemes, c.target_phonemes)
        )

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        source_lengths: Tensor | None = None,
        source_phonemes: Tensor | None = None,
        target_phonemes: Tensor | None = None,
        taps: bool = False,
    ) -> Any:
        """Teacher-forced: source (B, S, C), target (B, T, F), T a multiple of r -> Output.

        `source_lengths` (B,), from 1 to S; None: all S. Phonemes (B, L), integers, begin with
        whatever starts a sequence; without them their logits are None.
        """
        tap = Taps(taps)
        self.config.check_frames(target.shape[1])
        self.config.check_phonemes(source_phonemes is not None, target_phonemes is not None)
        encoded, mask = self.encode(source, source_lengths, tap)
        memory = self.decoder.rnn.attention.memory(encoded[-1], mask)
        target = target.to(encoded[-1].dtype)
        before, stop = self.decoder(target, memory, tap.at("decoder"))
        after = before + self.postnet(before, tap.at("postnet"))
        logits = [
            None if phonemes is None else decoder(phonemes, encoded[layer - 1], mask, tap.at(name))
            for name, decoder, phonemes, layer in self.auxiliary(source_phonemes, target_phonemes)
        ]
        return tap.result(Output(after, before, stop, *logits))

    @torch.no_grad()
    def translate(
        self, source: Tensor, steps: int, source_lengths: Tensor | None = None
    ) -> Translation:
        """Frame by frame from the model's own frames: source (B, S, C) -> Translation.

        Always `steps` steps; an utterance ends with the first whose stop logit is positive, and
        the post-net sees zeros after that.
        """
        if steps < 1:
            raise ValueError(f"steps is {steps}, and at least 1")
        encoded, mask = self.encode(source, source_lengths, Taps(False))
        memory = self.decoder.rnn.attention.memory(encoded[-1], mask)
        frames, stop = self.decoder.decode(memory, steps)
        ends = stop > 0
        ended = torch.where(ends.any(1), ends.long().argmax(1) + 1, steps)
        lengths = ended * self.config.reduction
        inside = torch.arange(frames.shape[1], device=frames.device) < lengths[:, None]
        before = frames * inside[..., None]
        after = (before + self.postnet(before, Taps(False))) * inside[..., None]
        return Translation(after, before, lengths)

    def auxiliary(self, source: Any, target: Any) -> list[tuple[str, Any, Any, int]]:
        """Name, module, phonemes and encoder layer of either phoneme decoder."""
        c = self.config
        return [
            ("source_decoder", self.source_decoder, source, c.source_layer),
            ("target_decoder", self.target_decoder, target, c.target_layer),
        ]

    def encode(
        self, source: Tensor, lengths: Tensor | None, tap: Taps
    ) -> tuple[list[Tensor], Tensor]:
        """The encoder's layers, and where there are frames: (B, S)."""
        B, S, _ = source.shape
        weight = self.decoder.stop.weight
        source = source.to(self.decoder.stop.dtype or weight.dtype)
        steps = torch.arange(S, device=source.device)
        mask = (steps < S).expand(B, S) if lengths is None else steps < lengths[:, None]
        return self.encoder(source, lengths, tap.at("encoder")), mask
