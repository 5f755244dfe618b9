"""scikit-learn's digits: 1797 grey images of 8 x 8, as images of any size and as sequences."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from training.data.common import last_step, plain, split
from training.data.tables import sklearn_datasets
from training.description import Data
from zoo.containers.errors import UsageError
from zoo.model import Config

HELD_OUT = 360  # a fifth


def load() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 8, 8) from 0 to 1, and their classes."""
    data = sklearn_datasets().load_digits()  # type: ignore[attr-defined]
    return data.images / 16.0, data.target.astype(np.int64)


def enlarge(images: np.ndarray, size: int) -> np.ndarray:
    """(N, 8, 8) -> (N, size, size): every pixel a square, with a margin of zeros around."""
    factor = size // 8
    if not factor:
        raise UsageError(f"the digits are 8 pixels wide, this model takes {size}", "take another")
    before = (size - 8 * factor) // 2
    margin = before, size - 8 * factor - before
    return np.pad(np.kron(images, np.ones((factor, factor))), ((0, 0), margin, margin))


def digits(size: int | None = None, channels: int | None = None) -> object:
    """The data function of digits as images, of the config's own size or of this one."""

    def data(config: Config, folder: Path | None) -> Data:
        images, y = load()
        images = enlarge(images, size or config.image_size)[:, None]
        images = np.repeat(images, channels or config.in_channels, axis=1)
        train, test = split({"x": images, "y": y}, HELD_OUT)
        return Data(train, test, plain, {"num_classes": 10})

    return data


def digit_rows(config: Config, folder: Path | None) -> Data:
    """Digits as sequences: a step is a row. One pixel of margin makes ten rows of ten."""
    images, y = load()
    train, test = split({"x": enlarge(images, config.input_size), "y": y}, HELD_OUT)
    return Data(train, test, last_step)
