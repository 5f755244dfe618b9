"""Scores on held-out data with a 95% confidence interval, computed in NumPy for both frameworks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Z = 1.959963984540054  # the normal distribution's 97.5% quantile


@dataclass(frozen=True)
class Score:
    """`value` of `metric` over `n` cases, between `low` and `high` with 95% confidence.

    `count` is how many cases were right, where cases are counted.
    """

    metric: str
    value: float
    low: float
    high: float
    n: int
    interval: str  # how `low` and `high` were found
    count: int | None = None

    def __str__(self) -> str:
        counted = f", {self.count} of {self.n}" if self.count is not None else f", n={self.n}"
        return f"{self.metric} {self.value:.4g} [{self.low:.4g}, {self.high:.4g}]{counted}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def counted(metric: str, right: int, n: int) -> Score:
    """A share of right cases, with Wilson's interval."""
    p = right / n
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    low, high = (centre - half if right else 0.0), (centre + half if right < n else 1.0)
    return Score(metric, p, low, high, n, "Wilson", right)


def mean(metric: str, values: np.ndarray) -> Score:
    """A mean of independent cases, with Student's interval."""
    n = len(values)
    middle = float(np.mean(values))
    if n < 2:
        return Score(metric, middle, -math.inf, math.inf, n, "none: one case")
    half = student(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Score(metric, middle, middle - half, middle + half, n, "Student's t")


def bootstrap(
    metric: str, statistic: Callable[[np.ndarray], float], cases: np.ndarray, draws: int = 2000
) -> Score:
    """`statistic` of `cases` (n, ...), with the percentiles of seeded resamples."""
    n = len(cases)
    rng = np.random.default_rng(0)
    found = [statistic(cases[rng.integers(0, n, n)]) for _ in range(draws)]
    low, high = np.percentile(found, [2.5, 97.5])
    return Score(metric, statistic(cases), float(low), float(high), n, f"bootstrap, {draws} draws")


def student(freedom: int) -> float:
    """The 97.5% quantile of Student's t, by the Cornish-Fisher expansion; within 1e-3 from 4 on."""
    if freedom < 4:
        return {1: 12.7062, 2: 4.3027, 3: 3.1824}[freedom]
    z, v = Z, freedom
    terms = (
        (z**3 + z) / 4 / v,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96 / v**2,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384 / v**3,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160 / v**4,
    )
    return z + sum(terms)
