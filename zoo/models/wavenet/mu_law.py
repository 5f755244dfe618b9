"""Mu-law companding (ITU-T G.711): how a wave becomes classes, and classes a wave. NumPy only."""

from __future__ import annotations

import numpy as np


def encode(wave: np.ndarray, classes: int = 256) -> np.ndarray:
    """A wave in [-1, 1], any shape -> int64 classes in [0, classes); silence is the middle one.

    Values outside of [-1, 1] are clipped.
    """
    mu = classes - 1
    x = np.clip(np.asarray(wave, np.float64), -1.0, 1.0)
    compressed = np.sign(x) * np.log1p(mu * np.abs(x)) / np.log1p(mu)
    return np.asarray(np.floor((compressed + 1) / 2 * mu + 0.5), np.int64)


def decode(samples: np.ndarray, classes: int = 256) -> np.ndarray:
    """Classes, any shape -> a float64 wave in [-1, 1]; `encode` gives the same classes back."""
    mu = classes - 1
    compressed = 2 * np.asarray(samples, np.float64) / mu - 1
    wave = np.sign(compressed) * np.expm1(np.abs(compressed) * np.log1p(mu)) / mu
    return np.asarray(wave, np.float64)
