"""Splits and plain batches."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from training.description import Arrays, Batch


def split(arrays: Mapping[str, np.ndarray], held_out: int) -> tuple[Arrays, Arrays]:
    """(training, held-out) examples: always the same ones, whatever the seed of a run."""
    n = len(next(iter(arrays.values())))
    order = np.random.default_rng(20260101).permutation(n)
    train, test = np.sort(order[held_out:]), np.sort(order[:held_out])
    return {k: v[train] for k, v in arrays.items()}, {k: v[test] for k, v in arrays.items()}


def plain(rows: Arrays, rng: np.random.Generator) -> Batch:
    """`x` is the input and `y` the target."""
    return Batch({"x": rows["x"]}, {"target": rows["y"]})


def time_major(rows: Arrays, rng: np.random.Generator) -> Batch:
    """`x` (B, T, F) as (T, B, F); `y` (B, ...) is of the whole sequence."""
    x = np.ascontiguousarray(rows["x"].swapaxes(0, 1))
    return Batch({"x": x}, {"target": rows["y"]}, axis=1)


def last_step(rows: Arrays, rng: np.random.Generator) -> Batch:
    """`x` (B, T, F) as (T, B, F); a class at every step, of which only the last one counts."""
    x = np.ascontiguousarray(rows["x"].swapaxes(0, 1))
    target = np.broadcast_to(rows["y"], x.shape[:2]).copy()
    weight = np.zeros(x.shape[:2])
    weight[-1] = 1 / x.shape[1]
    return Batch({"x": x}, {"target": target}, {"target": weight}, axis=1, target_axis=1)
