"""Translatotron's hyper-parameters (Jia 2019, section 3 and table 1), and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Config:
    """Defaults are those of the paper's Conversational data set, as far as it states them."""

    mel_channels: int = 80  # of a source frame
    encoder_layers: int = 8
    encoder_size: int = 1024  # units of each direction
    prenet_size: int = 32
    decoder_layers: int = 6
    decoder_size: int = 1024
    attention_size: int = 512  # units of all heads together
    attention_heads: int = 4
    frame_size: int = 1025  # bins of a target frame
    reduction: int = 2  # frames that one step of the decoder predicts
    postnet_layers: int = 5
    postnet_size: int = 512
    postnet_kernel: int = 5
    source_phonemes: int = 64  # symbols; 0: no decoder of the source's phonemes
    target_phonemes: int = 64
    source_layer: int = 8  # the encoder layer, from 1, that this decoder attends to
    target_layer: int = 8
    auxiliary_layers: int = 2  # of both phoneme decoders
    auxiliary_size: int = 256  # of their embeddings, LSTMs and attention
    dropout_prob: float = 0.2  # after every encoder layer
    prenet_dropout: float = 0.5
    attention_dropout: float = 0.1
    postnet_dropout: float = 0.5
    zoneout: float = 0.1  # of all decoders' LSTMs; acts outside of training too

    def __post_init__(self) -> None:
        if self.attention_size % self.attention_heads:
            raise ValueError(
                f"attention_size {self.attention_size} is not divisible by "
                f"attention_heads {self.attention_heads}"
            )
        if self.postnet_kernel % 2 == 0:
            raise ValueError(f"postnet_kernel {self.postnet_kernel} is even: it has no middle")
        if not 0 <= self.zoneout < 1:
            raise ValueError(f"zoneout {self.zoneout} is not in [0, 1)")
        for name in ("source_layer", "target_layer"):
            if not 1 <= getattr(self, name) <= self.encoder_layers:
                raise ValueError(f"{name} is none of the {self.encoder_layers} encoder layers")

    @property
    def postnet_widths(self) -> list[tuple[int, int]]:
        """Channels into and out of each convolution of the post-net."""
        inner = [self.postnet_size] * (self.postnet_layers - 1)
        return list(zip([self.frame_size, *inner], [*inner, self.frame_size], strict=True))

    def check_frames(self, frames: int) -> None:
        """Raises ValueError unless so many frames are a whole number of steps."""
        if frames < 1 or frames % self.reduction:
            raise ValueError(
                f"{frames} target frames are no multiple of {self.reduction}: pad them"
            )

    def check_phonemes(self, source: bool, target: bool) -> None:
        """Raises ValueError if there are phonemes for a decoder that is not there."""
        for name, there in (("source_phonemes", source), ("target_phonemes", target)):
            if there and not getattr(self, name):
                raise ValueError(f"{name} given, but this model has no decoder for them")


class Output(NamedTuple):
    """With the target given. B utterances of T frames of F bins, r at a time in K = T/r steps.

    Attention weights are those before dropout: N heads, over S frames of the source.
    """

    frames: Any  # (B, T, F), log-magnitudes
    frames_before: Any  # (B, T, F), before the post-net
    stop: Any  # (B, K), logits: this step is the last
    source_logits: Any  # (B, L, source_phonemes), of the next symbol; None if not asked for
    target_logits: Any  # (B, L, target_phonemes), likewise, of an L of its own
    attention_weights: Any  # (B, K, N, S)
    source_attention_weights: Any  # (B, L, 1, S); None where the logits are
    target_attention_weights: Any  # (B, L, 1, S), likewise


class Translation(NamedTuple):
    """Without a target, K steps long: frames are zero from where the utterance ends."""

    frames: Any  # (B, K * r, F)
    frames_before: Any  # (B, K * r, F), before the post-net
    lengths: Any  # (B,), frames until the end, that of the last step included


CONVERSATIONAL = Config()

PRESETS = {
    "translatotron": CONVERSATIONAL,
    "translatotron_fisher": replace(
        CONVERSATIONAL,
        encoder_size=256,
        decoder_layers=4,
        source_layer=4,
        target_layer=6,
        dropout_prob=0.3,
    ),
    "translatotron_small": replace(
        CONVERSATIONAL,
        encoder_layers=4,
        encoder_size=64,
        prenet_size=16,
        decoder_layers=2,
        decoder_size=96,
        attention_size=64,
        frame_size=129,
        postnet_size=48,
        source_layer=2,
        target_layer=3,
        auxiliary_size=32,
    ),
}

TINY = {
    "auxiliary": Config(
        mel_channels=5,
        encoder_layers=2,
        encoder_size=4,
        prenet_size=6,
        decoder_layers=1,
        decoder_size=5,
        attention_size=6,
        attention_heads=2,
        frame_size=7,
        reduction=2,
        postnet_layers=2,
        postnet_size=4,
        postnet_kernel=3,
        source_phonemes=9,
        target_phonemes=8,
        source_layer=1,
        target_layer=2,
        auxiliary_layers=2,
        auxiliary_size=4,
    ),
    "spectrogram_only": Config(
        mel_channels=4,
        encoder_layers=1,
        encoder_size=3,
        prenet_size=5,
        decoder_layers=2,
        decoder_size=4,
        attention_size=4,
        attention_heads=1,
        frame_size=6,
        reduction=1,
        postnet_layers=1,
        postnet_kernel=5,
        source_phonemes=0,
        target_phonemes=0,
        source_layer=1,
        target_layer=1,
        zoneout=0.0,
    ),
}
