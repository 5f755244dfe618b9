"""Tables of relative positions: of tokens in a row, and of the tokens of a window of an image."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np


def relative_indices(a: np.ndarray) -> Iterator[str]:
    """Expressions to try for a matrix of whole numbers."""
    if not (a == np.rint(a)).all():
        return
    cast = "" if a.dtype == np.int64 else f".astype(np.{a.dtype.name})"
    for text in itertools.chain(_in_a_row(a), _in_a_window(a)):
        yield f"{subject(text)}{cast}" if cast else text


def _in_a_row(a: np.ndarray) -> Iterator[str]:
    """How far a column is from a row, or a row from a column."""
    n, m = a.shape
    shift = int(a[0, 0])
    more = f" {'+-'[shift < 0]} {abs(shift)}" if shift else ""
    yield f"np.subtract.outer(np.arange({n}), np.arange({m})){more}"
    yield f"np.arange({m}) - np.arange({n})[:, None]{more}"
    yield f"np.abs(np.subtract.outer(np.arange({n}), np.arange({m})))"
    low, high = int(a.min()), int(a.max())
    for text in (
        f"np.arange({m}) - np.arange({n})[:, None]",
        f"np.subtract.outer(np.arange({n}), np.arange({m}))",
    ):
        clipped = f"np.clip({text}, {low - shift}, {high - shift}){more}"
        yield clipped


def _in_a_window(a: np.ndarray) -> Iterator[str]:
    """Swin's: (2h-1)(2w-1) pairs of distances, numbered; BEiT's has a class token before."""
    n, m = a.shape
    if n != m or n < 4:
        return
    for h, w in _sides(n):
        if int(a.max()) == (2 * h - 1) * (2 * w - 1) - 1:
            yield _window(h, w)
    top = int(a.max())
    for h, w in _sides(n - 1):
        if top == (2 * h - 1) * (2 * w - 1) + 2:
            row, column = f"np.full((1, {n - 1}), {a[0, 1]})", f"np.full(({n - 1}, 1), {a[1, 0]})"
            yield f"np.block([[np.array([[{a[0, 0]}]]), {row}], [{column}, {_window(h, w)}]])"


def _window(h: int, w: int) -> str:
    place = f"np.arange({h * w})"
    rows = f"np.subtract.outer({place} // {w}, {place} // {w})"
    columns = f"np.subtract.outer({place} % {w}, {place} % {w})"
    return f"({rows} + {h - 1}) * {2 * w - 1} + {columns} + {w - 1}"


def _sides(n: int) -> Iterator[tuple[int, int]]:
    """Windows of n tokens, the squarest first."""
    pairs = [(h, n // h) for h in range(1, n + 1) if n % h == 0]
    yield from sorted(pairs, key=lambda p: abs(p[0] - p[1]))


def subject(text: str) -> str:
    """An expression that an index or a method may follow."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c in "([") - (c in ")]")
        if depth == 0 and c in " +-*/~" and i + 1 < len(text):
            return f"({text})"
    return text
