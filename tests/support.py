"""Shared by the tests: every tiny configuration of every model, and checkpoints made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zoo import probe
from zoo.containers.base import TensorInfo, Writer
from zoo.containers.dtypes import code_of
from zoo.model import Config, Model
from zoo.registry import families

Arrays = dict[str, np.ndarray]
SLOW_FLAX = pytest.param("flax", marks=pytest.mark.slow)  # where it compiles a whole model


def every_tiny() -> Any:
    """Parametrizes a test over (model, config) for all tiny configurations.

    The fast lane takes the first of each family.
    """
    return pytest.mark.parametrize(
        ("model", "config"),
        [
            pytest.param(m, c, id=f"{m.name}-{n}", marks=[pytest.mark.slow] if i else [])
            for m in families().values()
            for i, (n, c) in enumerate(m.tiny.items())
        ],
    )


def every_family() -> Any:
    """Parametrizes a test over (model, config) for one tiny configuration of each family."""
    return pytest.mark.parametrize(
        ("model", "config"),
        [pytest.param(m, next(iter(m.tiny.values())), id=m.name) for m in families().values()],
    )


def every_config() -> Any:
    """Parametrizes a test over (model, config) for all presets and all tiny configurations.

    The fast lane takes one tiny configuration of each family.
    """
    return pytest.mark.parametrize(
        ("model", "config"),
        [
            pytest.param(
                m,
                c,
                id=f"{m.name}-{n}",
                marks=[] if n == next(iter(m.tiny)) else [pytest.mark.slow],
            )
            for m in families().values()
            for n, c in {**m.presets, **m.tiny}.items()
        ],
    )


def canonical(model: Model, config: Config) -> Arrays:
    """Name-seeded float32 weights: every tensor that is neither tied nor constant."""
    return {
        t.name: probe.weight(t.name, t.shape)
        for e in model.layout_of(config).entries
        if e.constant is None and e.tied_to is None
        for t in e.torch
    }


def write(writer: type[Writer], path: Path, arrays: Arrays, **metadata: str) -> Path:
    """A checkpoint of `arrays` in one container."""
    header = {n: TensorInfo(code_of(a.dtype), a.shape) for n, a in arrays.items()}
    with writer(path, header, metadata) as w:
        for name, array in arrays.items():
            w.write(name, array)
        w.finish()
    return path


def bits(array: np.ndarray) -> tuple[Any, ...]:
    """What must be equal for two arrays to be the same bit for bit."""
    return array.dtype, array.shape, np.ascontiguousarray(array).tobytes()
