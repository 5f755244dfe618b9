"""Translatotron in Flax NNX: the twin of model_torch.py, class by class.

Jia 2019, https://arxiv.org/abs/1904.06037.

B utterances; S source frames of C mel channels; T target frames of F bins, predicted r at a time in
K = T/r decoder steps; N attention heads, A units of all heads together; L phonemes. H is the size
of the LSTM in question.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from zoo.models.translatotron.config import Config, Output, Translation
from zoo.nn.additive_attention_flax import AdditiveAttention, Memory
from zoo.nn.batchnorm_flax import BatchNorm1d
from zoo.nn.conv_flax import Conv1d
from zoo.nn.options_flax import Options
from zoo.nn.recurrent_flax import LSTM, LSTMCell


class State(NamedTuple):
    """What AttentiveLSTM carries from one step to the next."""

    cells: tuple[tuple[Array, Array], ...]  # (h, c) of each layer, each (B, H)
    context: Array  # (B, A), what was attended to


class Masks(NamedTuple):
    """Random factors of all K steps, drawn before the loop, as NNX cannot draw in a scan.

    In evaluation they are constant, and axes of length 1 broadcast.
    """

    # (K, layers, 2, B, H): how far h and c move to their new values. 0 or 1 in training,
    # 1 - zoneout in evaluation.
    update: Array
    attention: Array  # (K, B, N, S): dropout. 0 or 1 / (1 - p) in training, 1 in evaluation


class Encoder(nnx.Module):
    """A stack of bidirectional LSTMs."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        widths = [c.mel_channels] + [2 * c.encoder_size] * (c.encoder_layers - 1)
        self.layers = nnx.List(
            LSTM(n, c.encoder_size, batch_first=True, bidirectional=True, **kw) for n in widths
        )
        self.dropout = nnx.Dropout(c.dropout_prob, rngs=kw["rngs"])

    def __call__(self, x: Array, lengths: Array | None = None) -> list[Array]:
        """x (B, S, C), lengths (B,) -> the outputs of every layer, (B, S, 2H) each."""
        outputs = []
        for layer in self.layers:
            x, _ = layer(x, lengths=lengths)
            x = self.dropout(x)
            outputs.append(x)
        return outputs


class PreNet(nnx.Module):
    """The bottleneck through which the decoder sees the frame before."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.fc1 = nnx.Linear(c.frame_size, c.prenet_size, **kw)
        self.fc2 = nnx.Linear(c.prenet_size, c.prenet_size, **kw)
        self.dropout = nnx.Dropout(c.prenet_dropout, rngs=kw["rngs"])

    def __call__(self, x: Array) -> Array:
        """(..., F) -> (..., prenet_size)."""
        x = self.dropout(jax.nn.relu(self.fc1(x)))
        return self.dropout(jax.nn.relu(self.fc2(x)))


class AttentiveLSTM(nnx.Module):
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
        self.size = size
        self.attention_size = attention_size
        self.keep = 1 - c.zoneout
        widths = [n_in + attention_size] + [size] * (layers - 1)
        self.cells = nnx.List(LSTMCell(n, size, **kw) for n in widths)
        self.attention = AdditiveAttention(
            query_dim=size, memory_dim=2 * c.encoder_size, size=attention_size, heads=heads, **kw
        )
        self.zoneout = nnx.Dropout(c.zoneout, rngs=kw["rngs"])
        self.attention_dropout = nnx.Dropout(c.attention_dropout, rngs=kw["rngs"])

    def __call__(self, x: Array, memory: Memory) -> tuple[Array, Array]:
        """x (B, K, n_in) -> the top layer's h and the context, (B, K, H + A), and the attention
        weights (B, K, N, S)."""

        def body(state: State, at: tuple[Array, Masks]) -> tuple[State, tuple[Array, ...]]:
            x, masks = at
            state, weights = self.step(x, state, memory, masks)
            return state, (state.cells[-1][0], state.context, weights)

        masks = self.masks(x.shape[1], memory)
        over_steps = x.swapaxes(0, 1), masks  # a scan runs over the first axis
        _, made = jax.lax.scan(body, self.start(memory), over_steps)
        tops, contexts, weights = (m.swapaxes(0, 1) for m in made)
        return jnp.concatenate([tops, contexts], -1), weights

    def step(self, x: Array, state: State, memory: Memory, masks: Masks) -> tuple[State, Array]:
        """x (B, n_in), masks of this step -> the next state, and attention weights (B, N, S)."""
        x = jnp.concatenate([x, state.context], -1)
        cells = []
        for cell, (h, c), update in zip(self.cells, state.cells, masks.update, strict=True):
            new_h, new_c = cell(x, (h, c))
            x = h + update[0] * (new_h - h)
            cells.append((x, c + update[1] * (new_c - c)))
        context, weights = self.attention(x, memory, masks.attention)
        return State(tuple(cells), context), weights

    def start(self, memory: Memory) -> State:
        """The state before the first step: zeros."""
        B, dtype = memory.keys.shape[0], memory.keys.dtype
        zeros = jnp.zeros((B, self.size), dtype)
        context = jnp.zeros((B, self.attention_size), dtype)
        return State(tuple((zeros, zeros) for _ in self.cells), context)

    def masks(self, steps: int, memory: Memory) -> Masks:
        """Draws the factors of K = `steps` steps, as Masks describes them."""
        B, S, N, _ = memory.keys.shape
        training = not self.zoneout.deterministic
        batch, size, weights = (B, self.size, (B, N, S)) if training else (1, 1, (1, 1, 1))
        ones = jnp.ones((steps, len(self.cells), 2, batch, size), memory.keys.dtype)
        # Dropout of ones is 0 or 1 / keep in training, and 1 in evaluation.
        update = self.keep * self.zoneout(ones)
        return Masks(update, self.attention_dropout(jnp.ones((steps, *weights), memory.keys.dtype)))


class SpectrogramDecoder(nnx.Module):
    """Tacotron 2's decoder (Shen 2018), with r frames a step."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
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
        self.frame = nnx.Linear(c.decoder_size + A, c.reduction * c.frame_size, **kw)
        self.stop = nnx.Linear(c.decoder_size + A, 1, **kw)

    def __call__(self, target: Array, memory: Memory) -> tuple[Array, Array, Array]:
        """target (B, T, F) -> frames (B, T, F), stop logits (B, K), and the attention weights
        (B, K, N, S)."""
        # Each step sees the last target frame of the step before; the first sees zeros.
        shifted = target[:, self.reduction - 1 : -1 : self.reduction]
        previous = jnp.pad(shifted, ((0, 0), (1, 0), (0, 0)))
        y, weights = self.rnn(self.prenet(previous), memory)
        return self.frame(y).reshape(target.shape), self.stop(y)[..., 0], weights

    def decode(self, memory: Memory, steps: int) -> tuple[Array, Array]:
        """K = `steps` steps, each from the last frame of the step before -> frames (B, T, F), stop
        logits (B, K)."""
        B, dtype = memory.keys.shape[0], memory.keys.dtype

        def body(
            carry: tuple[State, Array], masks: Masks
        ) -> tuple[tuple[State, Array], tuple[Array, Array]]:
            state, previous = carry  # `previous` is the last frame, (B, F)
            state, _ = self.rnn.step(self.prenet(previous), state, memory, masks)
            y = jnp.concatenate([state.cells[-1][0], state.context], -1)
            made = self.frame(y).reshape(B, self.reduction, -1)
            return (state, made[:, -1]), (made, self.stop(y)[:, 0])

        first = self.rnn.start(memory), jnp.zeros((B, self.frame_size), dtype)
        _, (frames, stop) = jax.lax.scan(body, first, self.rnn.masks(steps, memory))
        frames = frames.swapaxes(0, 1).reshape(B, steps * self.reduction, -1)
        return frames, stop.T


class PostNet(nnx.Module):
    """Convolutions over time that correct the decoder's frames."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        k = c.postnet_kernel
        self.convs = nnx.List(
            Conv1d(n, m, k, padding=k // 2, bias=False, **kw) for n, m in c.postnet_widths
        )
        self.norms = nnx.List(BatchNorm1d(m, **kw) for _, m in c.postnet_widths)
        self.dropout = nnx.Dropout(c.postnet_dropout, rngs=kw["rngs"])

    def __call__(self, frames: Array) -> Array:
        """frames (B, T, F) -> what to add to them."""
        x = frames
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x))
            x = self.dropout(jnp.tanh(x) if i + 1 < len(self.convs) else x)
        return x


class PhonemeDecoder(nnx.Module):
    """An auxiliary decoder: the phonemes of one language, each predicted from those before it."""

    def __init__(self, c: Config, symbols: int, **kw: Unpack[Options]) -> None:
        size = c.auxiliary_size
        self.embedding = nnx.Embed(symbols, size, **kw)
        self.rnn = AttentiveLSTM(
            c, n_in=size, size=size, layers=c.auxiliary_layers, attention_size=size, heads=1, **kw
        )
        self.output = nnx.Linear(2 * size, symbols, **kw)

    def __call__(self, phonemes: Array, encoded: Array, mask: Array) -> tuple[Array, Array]:
        """phonemes (B, L), of which the first starts the sequence, encoder outputs (B, S, 2H), mask
        (B, S) -> logits (B, L, symbols) of the next phonemes, attention weights (B, L, 1, S)."""
        y, weights = self.rnn(self.embedding(phonemes), self.rnn.attention.memory(encoded, mask))
        return self.output(y), weights


class Translatotron(nnx.Module):
    """Speech to speech, with decoders of the phonemes of both sides as auxiliary tasks."""

    def __init__(self, c: Config, **kw: Unpack[Options]) -> None:
        self.config = c
        self.encoder = Encoder(c, **kw)
        self.decoder = SpectrogramDecoder(c, **kw)
        self.postnet = PostNet(c, **kw)
        n, m = c.source_phonemes, c.target_phonemes
        self.source_decoder = PhonemeDecoder(c, n, **kw) if n else None
        self.target_decoder = PhonemeDecoder(c, m, **kw) if m else None

    def __call__(
        self,
        source: Array,
        target: Array,
        source_lengths: Array | None = None,
        source_phonemes: Array | None = None,
        target_phonemes: Array | None = None,
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
        target = jnp.asarray(target, encoded[-1].dtype)
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

    def translate(
        self, source: Array, steps: int, source_lengths: Array | None = None
    ) -> Translation:
        """source (B, S, C) -> Translation, each step from the frames of the step before.

        Always takes `steps` steps. An utterance ends with the first step whose stop logit is
        positive, and the post-net sees zeros after that. Compiled as one scan, for each size anew.

        Unlike in Tacotron 2 the pre-net's dropout is off, so that two runs are alike. ValueError in
        training mode, or if `steps` is below 1.
        """
        if not self.decoder.rnn.zoneout.deterministic:
            raise ValueError("translate() is for evaluation: call eval() first")
        if steps < 1:
            raise ValueError(f"steps is {steps}: at least 1 is needed")
        return _translate(*nnx.split(self), source, steps, source_lengths)

    def encode(self, source: Array, lengths: Array | None) -> tuple[list[Array], Array]:
        """source (B, S, C) -> the outputs of every encoder layer, (B, S, 2H) each, and the mask
        (B, S), true up to the end of each utterance."""
        B, S, _ = source.shape
        # In the model's dtype: a float64 spectrogram must not promote a float32 model.
        layer = self.decoder.stop
        source = jnp.asarray(source, layer.dtype or layer.kernel[...].dtype)
        mask = jnp.ones((B, S), bool) if lengths is None else jnp.arange(S) < lengths[:, None]
        return self.encoder(source, lengths), mask


@partial(jax.jit, static_argnames=("graph", "steps"))
def _translate(
    graph: nnx.GraphDef[Translatotron],
    state: nnx.State,
    source: Array,
    steps: int,
    source_lengths: Array | None,
) -> Translation:
    model = nnx.merge(graph, state)
    encoded, mask = model.encode(source, source_lengths)
    memory = model.decoder.rnn.attention.memory(encoded[-1], mask)
    made, stop = model.decoder.decode(memory, steps)
    ends = stop > 0
    ended = jnp.where(ends.any(1), ends.argmax(1) + 1, steps)
    lengths = ended * model.config.reduction
    inside = jnp.arange(made.shape[1]) < lengths[:, None]
    frames_before = made * inside[..., None]
    frames = (frames_before + model.postnet(frames_before)) * inside[..., None]
    return Translation(frames, frames_before, lengths)
