"""Masked characters of Python's own documentation, which comes with Python (PSF licence)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from training.description import Arrays, Batch, Data
from zoo.containers.errors import UsageError
from zoo.model import Config

PAD, UNKNOWN, MASK, FIRST = 0, 1, 2, 4
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))  # 96 characters
SIZE = FIRST + len(ALPHABET)
LENGTH = 32
# The held-out text is kept, not taken from the Python that runs: another version has other words.
HELD_OUT = Path(__file__).parents[3] / "tests" / "data" / "topics_held_out.txt"
HELD_OUT_TOPICS = ("assert", "attribute-access", "booleans", "break", "class", "comparisons")


def topics() -> dict[str, str]:
    """Topic -> text of `help()`'s topics in the Python that runs."""
    from pydoc_data.topics import topics as found

    return dict(found)


def encode(text: str) -> np.ndarray:
    """Characters as tokens; the few outside of ASCII are unknown."""
    known = {c: FIRST + i for i, c in enumerate(ALPHABET)}
    return np.array([known.get(c, UNKNOWN) for c in text])


def windows(text: str, length: int) -> np.ndarray:
    """(N, length) tokens, one piece after the other."""
    tokens = encode(text)
    return tokens[: len(tokens) // length * length].reshape(-1, length)


def masked(rows: Arrays, rng: np.random.Generator, share: float = 0.15) -> Batch:
    """15% of the characters are to be told: 8 of 10 of them hidden, one replaced, one kept."""
    tokens = rows["tokens"]
    chosen = rng.random(tokens.shape) < share
    chosen[:, 0] |= ~chosen.any(axis=1)
    fate = rng.random(tokens.shape)
    given = np.where(chosen & (fate < 0.8), MASK, tokens)
    random = rng.integers(FIRST, SIZE, tokens.shape)
    given = np.where(chosen & (fate >= 0.8) & (fate < 0.9), random, given)
    weight = chosen / chosen.sum()
    return Batch({"input_ids": given}, {"target": tokens}, {"target": weight})


def masked_topics(config: Config, folder: Path | None) -> Data:
    """All topics but the held-out ones, in pieces of 32 characters."""
    if config.vocab_size < SIZE:
        raise UsageError(
            f"a vocabulary of {config.vocab_size} has no room for {SIZE} characters",
            f"take vocab_size={SIZE} or more",
        )
    length = min(LENGTH, config.max_position_embeddings)
    text = "\n\n".join(v for k, v in sorted(topics().items()) if k not in HELD_OUT_TOPICS)
    train = {"tokens": windows(text, length)}
    test = {"tokens": windows(HELD_OUT.read_text(), length)}
    return Data(train, test, masked)
