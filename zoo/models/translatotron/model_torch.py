"""Translatotron in PyTorch. Jia 2019, https://arxiv.org/abs/1904.06037.

B utterances; S source frames of C mel channels; T target frames of F bins, predicted r at a time in
K = T/r decoder steps; N attention heads, A units of all heads together; L phonemes. H is the size
of the LSTM in question.
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

import torch
from torch import Tensor, nn, relu, tanh
from torch.nn.functional import pad

from zoo.models.translatotron.config import Config, Output, Translation
from zoo.nn.additive_attention_torch import AdditiveAttention, Memory
from zoo.nn.batchnorm_torch import BatchNorm1d
from zoo.nn.conv_torch import Conv1d
from zoo.nn.layers_torch import Embedding, Linear
from zoo.nn.options_torch import Options
from zoo.nn.recurrent_torch import LSTM, LSTMCell


class State(NamedTuple):
    """What AttentiveLSTM carries from one step to the next."""

    cells: tuple[tuple[Tensor, Tensor], ...]  # (h, c) of each layer, each (B, H)
    context: Tensor  # (B, A), what was attended to


class Masks(NamedTuple):
    """Random factors of all K steps, drawn before the loop, as NNX cannot draw in a scan.

    In evaluation they are constant, and axes of length 1 broadcast.
    """

    # (K, layers, 2, B, H): how far h and c move to their new values. 0 or 1 in training,
    # 1 - zoneout in evaluation.
    update: Tensor
    attention: Tensor  # (K, B, N, S): dropout. 0 or 1 / (1 - p) in training, 1 in evaluation


class Encoder(nn.Module):
    """A stack of bidirectional LSTMs."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        widths = [c.mel_channels] + [2 * c.encoder_size] * (c.encoder_layers - 1)
        self.layers = nn.ModuleList(
            LSTM(n, c.encoder_size, batch_first=True, bidirectional=True, **kw) for n in widths
        )
        self.dropout = nn.Dropout(c.dropout_prob)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
        """x (B, S, C), lengths (B,) -> the outputs of every layer, (B, S, 2H) each."""
        outputs = []
        for layer in self.layers:
            x, _ = layer(x, lengths=lengths)
            x = self.dropout(x)
            outputs.append(x)
        return outputs


class PreNet(nn.Module):
    """The bottleneck through which the decoder sees the frame before."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.fc1 = Linear(c.frame_size, c.prenet_size, **kw)
        self.fc2 = Linear(c.prenet_size, c.prenet_size, **kw)
        self.dropout = nn.Dropout(c.prenet_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., F) -> (..., prenet_size)."""
        x = self.dropout(relu(self.fc1(x)))
        return self.dropout(relu(self.fc2(x)))


class AttentiveLSTM(nn.Module):
    """LSTM layers with attention.

    At each step the bottom layer reads the input and the last context, and h of the top layer is
    the query for the next context. Zoneout (Krueger 2016): in training each unit of h and c keeps
    its old value with probability `zoneout`; in evaluation it moves by the mean, 1 - zoneout of the
    way.
    """

    def __init__(
        self,
        c: Config,
        *,
        n_in: int,
        size: int,
        layers: int,
        attention_size: int,
        heads: int,
        **kw: Unpack[Options],
    ) -> None:
        super().__init__()
        self.size = size
        self.attention_size = attention_size
        self.keep = 1 - c.zoneout
        widths = [n_in + attention_size] + [size] * (layers - 1)
        self.cells = nn.ModuleList(LSTMCell(n, size, **kw) for n in widths)
        self.attention = AdditiveAttention(
            query_dim=size, memory_dim=2 * c.encoder_size, size=attention_size, heads=heads, **kw
        )
        self.zoneout = nn.Dropout(c.zoneout)
        self.attention_dropout = nn.Dropout(c.attention_dropout)

    def forward(self, x: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """x (B, K, n_in) -> the top layer's h and the context, (B, K, H + A), and the attention
        weights (B, K, N, S)."""
        K = x.shape[1]
        masks = self.masks(K, memory)
        state = self.start(memory)
        tops, contexts, weights = [], [], []
        for k in range(K):
            state, w = self.step(x[:, k], state, memory, Masks(*(m[k] for m in masks)))
            tops.append(state.cells[-1][0])
            contexts.append(state.context)
            weights.append(w)
        y = torch.cat([torch.stack(tops, 1), torch.stack(contexts, 1)], -1)
        return y, torch.stack(weights, 1)

    def step(self, x: Tensor, state: State, memory: Memory, masks: Masks) -> tuple[State, Tensor]:
        """x (B, n_in), masks of this step -> the next state, and attention weights (B, N, S)."""
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
        """Draws the factors of K = `steps` steps, as Masks describes them."""
        B, S, N, _ = memory.keys.shape
        batch, size, weights = (B, self.size, (B, N, S)) if self.training else (1, 1, (1, 1, 1))
        ones = memory.keys.new_ones(steps, len(self.cells), 2, batch, size)
        # Dropout of ones is 0 or 1 / keep in training, and 1 in evaluation.
        update = self.keep * self.zoneout(ones)
        return Masks(update, self.attention_dropout(memory.keys.new_ones(steps, *weights)))


class SpectrogramDecoder(nn.Module):
    """Tacotron 2's decoder (Shen 2018), with r frames a step."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.reduction = c.reduction
        self.frame_size = c.frame_size
        A = c.attention_size
        self.prenet = PreNet(c, **kw)
        self.rnn = AttentiveLSTM(
            c,
            n_in=c.prenet_size,
            size=c.decoder_size,
            layers=c.decoder_layers,
            attention_size=A,
            heads=c.attention_heads,
            **kw,
        )
        self.frame = Linear(c.decoder_size + A, c.reduction * c.frame_size, **kw)
        self.stop = Linear(c.decoder_size + A, 1, **kw)

    def forward(self, target: Tensor, memory: Memory) -> tuple[Tensor, Tensor, Tensor]:
        """target (B, T, F) -> frames (B, T, F), stop logits (B, K), and the attention weights
        (B, K, N, S)."""
        # Each step sees the last target frame of the step before; the first sees zeros.
        shifted = target[:, self.reduction - 1 : -1 : self.reduction]
        previous = pad(shifted, (0, 0, 1, 0))
        y, weights = self.rnn(self.prenet(previous), memory)
        return self.frame(y).reshape(target.shape), self.stop(y)[..., 0], weights

    def decode(self, memory: Memory, steps: int) -> tuple[Tensor, Tensor]:
        """K = `steps` steps, each from the last frame of the step before -> frames (B, T, F), stop
        logits (B, K)."""
        B = memory.keys.shape[0]
        masks = self.rnn.masks(steps, memory)
        state = self.rnn.start(memory)
        previous = memory.keys.new_zeros(B, self.frame_size)
        frames, stops = [], []
        for k in range(steps):
            x = self.prenet(previous)
            state, _ = self.rnn.step(x, state, memory, Masks(*(m[k] for m in masks)))
            y = torch.cat([state.cells[-1][0], state.context], -1)
            made = self.frame(y).view(B, self.reduction, -1)
            previous = made[:, -1]
            frames.append(made)
            stops.append(self.stop(y))
        return torch.cat(frames, 1), torch.cat(stops, 1)


class PostNet(nn.Module):
    """Convolutions over time that correct the decoder's frames."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        k = c.postnet_kernel
        self.convs = nn.ModuleList(
            Conv1d(n, m, k, padding=k // 2, bias=False, **kw) for n, m in c.postnet_widths
        )
        self.norms = nn.ModuleList(BatchNorm1d(m, **kw) for _, m in c.postnet_widths)
        self.dropout = nn.Dropout(c.postnet_dropout)

    def forward(self, frames: Tensor) -> Tensor:
        """frames (B, T, F) -> what to add to them."""
        x = frames.transpose(1, 2)  # (B, F, T)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x))
            x = self.dropout(tanh(x) if i + 1 < len(self.convs) else x)
        return x.transpose(1, 2)


class PhonemeDecoder(nn.Module):
    """An auxiliary decoder: the phonemes of one language, each predicted from those before it."""

    def __init__(self, c: Config, symbols: int, **kw: Unpack[Options]) -> None:
        super().__init__()
        size = c.auxiliary_size
        self.embedding = Embedding(symbols, size, **kw)
        self.rnn = AttentiveLSTM(
            c, n_in=size, size=size, layers=c.auxiliary_layers, attention_size=size, heads=1, **kw
        )
        self.output = Linear(2 * size, symbols, **kw)

    def forward(self, phonemes: Tensor, encoded: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """phonemes (B, L), of which the first starts the sequence, encoder outputs (B, S, 2H), mask
        (B, S) -> logits (B, L, symbols) of the next phonemes, attention weights (B, L, 1, S)."""
        y, weights = self.rnn(self.embedding(phonemes), self.rnn.attention.memory(encoded, mask))
        return self.output(y), weights


class Translatotron(nn.Module):
    """Speech to speech, with decoders of the phonemes of both sides as auxiliary tasks."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        super().__init__()
        self.config = c
        self.encoder = Encoder(c, **kw)
        self.decoder = SpectrogramDecoder(c, **kw)
        self.postnet = PostNet(c, **kw)
        n, m = c.source_phonemes, c.target_phonemes
        self.source_decoder = PhonemeDecoder(c, n, **kw) if n else None
        self.target_decoder = PhonemeDecoder(c, m, **kw) if m else None

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        source_lengths: Tensor | None = None,
        source_phonemes: Tensor | None = None,
        target_phonemes: Tensor | None = None,
    ) -> Output:
        """Teacher-forced: source (B, S, C), target (B, T, F), T a multiple of r -> Output.

        `source_lengths` (B,), from 1 to S; None: all S. Phonemes (B, L), integers, begin with
        the symbol that starts a sequence; without them their logits and weights are None.
        ValueError for another T, or for phonemes that the config has no decoder for.
        """
        c = self.config
        c.check_frames(target.shape[1])
        c.check_phonemes(source_phonemes is not None, target_phonemes is not None)
        encoded, mask = self.encode(source, source_lengths)
        memory = self.decoder.rnn.attention.memory(encoded[-1], mask)
        target = target.to(encoded[-1].dtype)
        frames_before, stop, weights = self.decoder(target, memory)
        frames = frames_before + self.postnet(frames_before)
        source_logits = source_weights = target_logits = target_weights = None
        # Encoder layers count from 1.
        if self.source_decoder is not None and source_phonemes is not None:
            layer = encoded[c.source_layer - 1]
            source_logits, source_weights = self.source_decoder(source_phonemes, layer, mask)
        if self.target_decoder is not None and target_phonemes is not None:
            layer = encoded[c.target_layer - 1]
            target_logits, target_weights = self.target_decoder(target_phonemes, layer, mask)
        return Output(
            frames,
            frames_before,
            stop,
            source_logits,
            target_logits,
            weights,
            source_weights,
            target_weights,
        )

    @torch.no_grad()
    def translate(
        self, source: Tensor, steps: int, source_lengths: Tensor | None = None
    ) -> Translation:
        """source (B, S, C) -> Translation, each step from the frames of the step before.

        Always takes `steps` steps. An utterance ends with the first step whose stop logit is
        positive, and the post-net sees zeros after that.

        Unlike in Tacotron 2 the pre-net's dropout is off, so that two runs are alike. ValueError in
        training mode, or if `steps` is below 1.
        """
        if self.training:
            raise ValueError("translate() is for evaluation: call eval() first")
        if steps < 1:
            raise ValueError(f"steps is {steps}: at least 1 is needed")
        encoded, mask = self.encode(source, source_lengths)
        memory = self.decoder.rnn.attention.memory(encoded[-1], mask)
        made, stop = self.decoder.decode(memory, steps)
        ends = stop > 0
        ended = torch.where(ends.any(1), ends.long().argmax(1) + 1, steps)
        lengths = ended * self.config.reduction
        inside = torch.arange(made.shape[1], device=made.device) < lengths[:, None]
        frames_before = made * inside[..., None]
        frames = (frames_before + self.postnet(frames_before)) * inside[..., None]
        return Translation(frames, frames_before, lengths)

    def encode(self, source: Tensor, lengths: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """source (B, S, C) -> the outputs of every encoder layer, (B, S, 2H) each, and the mask
        (B, S), true up to the end of each utterance."""
        B, S, _ = source.shape
        # In the model's dtype: a float64 spectrogram must not promote a float32 model.
        layer = self.decoder.stop
        source = source.to(layer.dtype or layer.weight.dtype)
        if lengths is None:
            mask = torch.ones(B, S, dtype=torch.bool, device=source.device)
        else:
            mask = torch.arange(S, device=source.device) < lengths[:, None]
        return self.encoder(source, lengths), mask
