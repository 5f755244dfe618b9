"""scikit-learn's tables, and synthetic regression by fixed random teachers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from training.data.common import plain, split, time_major
from training.description import Data
from zoo.containers.errors import UsageError
from zoo.model import Config


def sklearn_datasets() -> object:
    """scikit-learn's module of data sets. UsageError where it is not installed."""
    try:
        from sklearn import datasets
    except ImportError:
        raise UsageError(
            "this task's data come with scikit-learn, which is not installed",
            "pip install scikit-learn, or run scripts/setup",
        ) from None
    return datasets


def cancer(config: Config, folder: Path | None) -> Data:
    """Breast cancer, 569 tumours: the ten "worst" measurements, standardised -> benign or not."""
    data = sklearn_datasets().load_breast_cancer()  # type: ignore[attr-defined]
    y = data.target[:, None].astype(np.float64)
    return _standardised(data.data[:, 20:30], y)


def diabetes(config: Config, folder: Path | None) -> Data:
    """Diabetes, 442 patients: ten measurements -> progression after a year, standardised."""
    data = sklearn_datasets().load_diabetes()  # type: ignore[attr-defined]
    y = data.target[:, None]
    return _standardised(data.data, (y - 152.0) / 77.0)  # mean and deviation of the whole


def _standardised(x: np.ndarray, y: np.ndarray) -> Data:
    """A fifth held out; features scaled by the training part alone."""
    train, test = split({"x": np.asarray(x, np.float64), "y": y}, len(x) // 5)
    mean, std = train["x"].mean(0), train["x"].std(0)
    train, test = ({"x": (part["x"] - mean) / std, "y": part["y"]} for part in (train, test))
    return Data(train, test, plain)


def linear(config: Config, folder: Path | None) -> Data:
    """y = W x + b with noise of a tenth; for models that end in a ReLU, its positive part."""
    size = getattr(config, "in_features", 10), getattr(config, "out_features", 10)
    rng = np.random.default_rng(1)
    w, b = rng.standard_normal(size), rng.standard_normal(size[1])
    x = rng.standard_normal((1000, size[0]))
    y = x @ w + b
    if hasattr(config, "layer"):
        y = np.maximum(y, 0)
    y = y + 0.1 * rng.standard_normal(y.shape)
    train, test = split({"x": x, "y": y}, 200)
    return Data(train, test, plain)


def smooth(config: Config, folder: Path | None) -> Data:
    """y = tanh(x V) W, with noise of a tenth, for a multilayer perceptron's sizes."""
    n_in, n_out = config.sizes[0], config.sizes[-1]
    rng = np.random.default_rng(2)
    v = rng.standard_normal((n_in, 6)) / np.sqrt(n_in)
    w = rng.standard_normal((6, n_out)) / np.sqrt(6)
    x = rng.standard_normal((2000, n_in))
    y = np.tanh(x @ v * 1.5) @ w + 0.1 * rng.standard_normal((2000, n_out))
    train, test = split({"x": x, "y": y}, 400)
    return Data(train, test, plain)


def memory(config: Config, folder: Path | None) -> Data:
    """Sequences of 12 steps; y is a sum over steps that fades by a fifth a step."""
    rng = np.random.default_rng(3)
    steps, n_in, n_out = 12, config.input_size, config.output_size
    w = rng.standard_normal((n_in, n_out)) / np.sqrt(n_in)
    x = rng.standard_normal((2000, steps, n_in))
    fading = 0.8 ** np.arange(steps)[::-1]
    y = np.tanh(np.einsum("t,ntf,fo->no", fading, x, w)) + 0.05 * rng.standard_normal((2000, n_out))
    train, test = split({"x": x, "y": y}, 400)
    return Data(train, test, plain if config.batch_first else time_major)
