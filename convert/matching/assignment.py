"""The best one-to-one assignment, and by how much each of its pairs is better than without it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Scores = Mapping[tuple[int, int], float]


def assign(scores: Scores) -> dict[tuple[int, int], float]:
    """The pairs of the assignment of the highest total, each with its margin: what the total loses
    if that pair may not be. Only pairs in `scores` may be; leaving both alone is worth 0.

    Parts that share no row and no column are assigned apart.
    """
    found: dict[tuple[int, int], float] = {}
    for rows, columns in _parts(scores):
        found |= _assign_part(scores, rows, columns)
    return found


def _parts(scores: Scores) -> list[tuple[list[int], list[int]]]:
    """Rows and columns that hang together."""
    of_row: dict[int, list[int]] = {}
    of_column: dict[int, list[int]] = {}
    for i, j in scores:
        of_row.setdefault(i, []).append(j)
        of_column.setdefault(j, []).append(i)
    parts = []
    seen: set[int] = set()
    for start in of_row:
        if start in seen:
            continue
        rows, columns, open_ = {start}, set(), [start]
        while open_:
            for j in of_row[open_.pop()]:
                if j not in columns:
                    columns.add(j)
                    fresh = set(of_column[j]) - rows
                    rows |= fresh
                    open_ += fresh
        seen |= rows
        parts.append((sorted(rows), sorted(columns)))
    return parts


def _assign_part(
    scores: Scores, rows: list[int], columns: list[int]
) -> dict[tuple[int, int], float]:
    """A square problem: every row may also stay alone, and every column."""
    from scipy.optimize import linear_sum_assignment

    n, m = len(rows), len(columns)
    never = -1e6
    table = np.full((n + m, m + n), never)
    at = {r: k for k, r in enumerate(rows)}, {c: k for k, c in enumerate(columns)}
    for (i, j), score in scores.items():
        if i in at[0] and j in at[1]:
            table[at[0][i], at[1][j]] = score
    table[np.arange(n), m + np.arange(n)] = 0.0
    table[n + np.arange(m), np.arange(m)] = 0.0
    table[n:, m:] = 0.0
    _, chosen = linear_sum_assignment(table, maximize=True)
    losses = _losses(table, chosen)
    return {
        (rows[i], columns[j]): float(losses[i])
        for i, j in enumerate(chosen[:n])
        if j < m and table[i, j] > never / 2
    }


def _losses(table: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """What forbidding each row's choice costs: the cheapest cycle of exchanges through it."""
    n = len(chosen)
    # row i takes what row k has: what i loses
    change = table[np.arange(n), chosen][:, None] - table[:, chosen]
    np.fill_diagonal(change, np.inf)
    shortest = change.copy()
    for k in range(n):
        np.minimum(shortest, shortest[:, k, None] + shortest[None, k], out=shortest)
    return np.asarray(np.diagonal(shortest))
