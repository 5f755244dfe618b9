"""Generated tones: as quantised samples, and as pairs of spectrograms."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from training.description import Arrays, Batch, Data
from zoo.model import Config

RATE = 8000  # samples a second


def mu_law(x: np.ndarray, classes: int) -> np.ndarray:
    """[-1, 1] -> integers in [0, classes), by the mu-law of G.711 with mu = classes - 1."""
    mu = classes - 1
    squeezed = np.sign(x) * np.log1p(mu * np.abs(x)) / np.log1p(mu)
    return np.clip(np.floor((squeezed + 1) / 2 * classes), 0, mu).astype(np.int64)


def chords(rng: np.random.Generator, n: int, length: int) -> np.ndarray:
    """(n, length): two tones of 200 to 1000 Hz, of random loudness and phase, and some noise."""
    t = np.arange(length) / RATE
    hertz = rng.uniform(200, 1000, (n, 2, 1))
    loud = rng.uniform(0.1, 0.45, (n, 2, 1))
    phase = rng.uniform(0, 2 * np.pi, (n, 2, 1))
    tones = (loud * np.sin(2 * np.pi * hertz * t + phase)).sum(axis=1)
    return tones + 0.005 * rng.standard_normal((n, length))


def tones(config: Config, folder: Path | None) -> Data:
    """Sequences of 256 samples and one: each predicts the next."""
    rng = np.random.default_rng(6)
    samples = mu_law(chords(rng, 2064, 257), config.classes)
    return Data({"samples": samples[:-64]}, {"samples": samples[-64:]}, _next_sample)


def _next_sample(rows: Arrays, rng: np.random.Generator) -> Batch:
    samples = rows["samples"]
    return Batch({"samples": samples[:, :-1]}, {"target": samples[:, 1:]})


# --- Translatotron: a source of pure tones, a target of the same melody, slower and elsewhere ---

NOTES, HOLD = 8, 4  # notes of the scale, frames of one note


def melodies(config: Config, folder: Path | None) -> Data:
    """Melodies of four notes. A source frame has a peak in its channels where the note is, a target
    frame one per harmonic; the phonemes are the notes, of the source and transposed."""
    rng = np.random.default_rng(7)
    notes = rng.integers(0, NOTES, (640, 4))
    r = config.reduction
    hold = -(-HOLD // r) * r  # a whole number of the decoder's steps
    source = _peaks(notes, config.mel_channels, (1,)).repeat(HOLD, axis=1)
    target = _peaks(notes, config.frame_size, (1, 2)).repeat(hold, axis=1)
    noise = 0.05 * rng.standard_normal(source.shape)
    parts = {"source": source + noise, "target": target, "notes": notes}
    train = {k: v[:-64] for k, v in parts.items()}
    test = {k: v[-64:] for k, v in parts.items()}
    return Data(train, test, _Utterances(r, config.source_phonemes, config.target_phonemes))


def _peaks(notes: np.ndarray, bins: int, harmonics: tuple[int, ...]) -> np.ndarray:
    """(N, L) notes -> (N, L, bins): a bump around the note's bin, and around its multiples."""
    at = (notes[..., None] + 1) * bins / (NOTES * len(harmonics) + 2)
    k = np.arange(bins)
    return sum(np.exp(-(((k - h * at) / (0.02 * bins + 1)) ** 2)) / h for h in harmonics)


class _Utterances:
    """Teacher forcing: the target is an input as well."""

    def __init__(self, reduction: int, source_phonemes: int, target_phonemes: int) -> None:
        self.reduction = reduction
        self.phonemes = source_phonemes, target_phonemes

    def __call__(self, rows: Arrays, rng: np.random.Generator) -> Batch:
        frames, notes = rows["target"], rows["notes"]
        stop = np.zeros((len(frames), frames.shape[1] // self.reduction))
        stop[:, -1] = 1
        inputs = {"source": rows["source"], "target": frames}
        targets = {"frames": frames, "stop": stop}
        for side, shift in (("source", 0), ("target", 3)):
            if self.phonemes[side == "target"]:
                symbols = (notes + shift) % NOTES + 1  # 0 starts a sequence
                start = np.zeros((len(notes), 1), np.int64)
                inputs[f"{side}_phonemes"] = np.concatenate([start, symbols[:, :-1]], axis=1)
                targets[f"{side}_phonemes"] = symbols
        return Batch(inputs, targets)
