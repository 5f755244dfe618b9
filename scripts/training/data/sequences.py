"""Generated pairs of token sequences: sums, and brackets that want closing.

0 is padding and the Switch Transformer's start, 1 ends a sequence, 2 starts one elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from training.description import Arrays, Batch, Data
from zoo.model import Config

PAD, END, START, FIRST = 0, 1, 2, 3
DIGITS, PLUS = FIRST, FIRST + 10  # ten digits, then the plus sign
OPENING = "([{<"
Pairs = tuple[np.ndarray, np.ndarray]


def additions(modulus: int = 1000, train: int = 20000, test: int = 1000) -> Pairs:
    """Sources `987+765` and targets `257`, both backwards, units first: a + b modulo 1000.

    No pair stands twice, so none of those held out is among the others.
    """
    rng = np.random.default_rng(4)
    width = len(str(modulus - 1))
    pairs = rng.choice(modulus * modulus, train + test, replace=False)
    a, b = pairs // modulus, pairs % modulus
    plus = np.full((len(pairs), 1), PLUS)
    source = np.concatenate([_digits(a, width), plus, _digits(b, width)], axis=1)
    end = np.full((len(pairs), 1), END)
    return source, np.concatenate([_digits((a + b) % modulus, width), end], axis=1)


def _digits(numbers: np.ndarray, width: int) -> np.ndarray:
    """(N,) -> (N, width) tokens, units first."""
    return np.stack([numbers // 10**i % 10 for i in range(width)], axis=1) + DIGITS


def brackets(length: int = 16, depth: int = 6, train: int = 20000, test: int = 1000) -> Pairs:
    """Sources such as `([]{<>`, targets what closes them, `})`; padded, and all different."""
    rng = np.random.default_rng(5)
    kinds = len(OPENING)
    source = np.full((train + test, length), PAD)
    target = np.full((train + test, depth + 1), PAD)
    seen: set[bytes] = set()
    while len(seen) < train + test:
        row, open_ = len(seen), []
        tokens = []
        for _ in range(rng.integers(4, length + 1)):
            if len(open_) < depth and (not open_ or rng.random() < 0.55):
                open_.append(int(rng.integers(kinds)))
                tokens.append(FIRST + open_[-1])
            else:
                tokens.append(FIRST + kinds + open_.pop())
        closing = [FIRST + kinds + kind for kind in reversed(open_)]
        key = bytes(tokens)
        if key in seen:
            continue
        seen.add(key)
        source[row, : len(tokens)] = tokens
        target[row, : len(closing) + 1] = [*closing, END]
    return source, target


def _of_transformer(rows: Arrays, rng: np.random.Generator, padded: bool = True) -> Batch:
    source, target = rows["source"], rows["target"]
    inputs = {"src": source, "tgt": shifted(target, START)}
    if padded:
        inputs["src_key_padding_mask"] = source == PAD
    return Batch(inputs, {"target": target}, {"target": weights(target)})


def _of_switch(rows: Arrays, rng: np.random.Generator, padded: bool = True) -> Batch:
    source, target = rows["source"], rows["target"]
    inputs = {
        "input_ids": source,
        "attention_mask": (source != PAD).astype(np.int64),
        "decoder_input_ids": shifted(target, PAD),
    }
    return Batch(inputs, {"target": target}, {"target": weights(target)})


def shifted(target: np.ndarray, start: int) -> np.ndarray:
    """What the decoder is given: the start, then the target without its last token."""
    return np.concatenate([np.full((len(target), 1), start), target[:, :-1]], axis=1)


def weights(target: np.ndarray) -> np.ndarray:
    """Alike for all tokens, none for padding."""
    real = (target != PAD).astype(np.float64)
    return real / real.sum()


def pairs_for(
    make: Callable[[], Pairs], family: str, held_out: int = 1000
) -> Callable[[Config, Path | None], Data]:
    """The data function of generated pairs for "transformer" or "switch"; the last are held out."""
    batch = _of_transformer if family == "transformer" else _of_switch
    padded = make is brackets

    def data(config: Config, folder: Path | None) -> Data:
        source, target = make()
        parts = [
            {"source": source[rows], "target": target[rows]}
            for rows in (slice(None, -held_out), slice(-held_out, None))
        ]
        return Data(*parts, partial(batch, padded=padded))

    return data
