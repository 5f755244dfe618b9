"""One tensor of both sides beside its rounding noise."""

from __future__ import annotations

from dataclasses import dataclass

FLOOR = 2.0**-23  # of the scale: float32's own resolution


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of one tensor: the reference's float32 values, and how far the other's are from them.

    `bins[i]` counts the elements whose |a - b| / scale lies in [10^(i-20), 10^(i-19)); the first
    bin takes what is smaller, zero included, the last what is larger or not a number.
    """

    minimum: float
    maximum: float
    mean: float
    std: float
    mean_error: float
    bins: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of both sides, float32 against float32, beside its rounding noise.

    `noise` is the largest difference between float32 and float64 on the PyTorch side, `scale` its
    largest value. Same means `error <= 8 max(noise, 2^-23 scale)` and, in float64,
    `error64 <= 1e-10 scale`. A row that is not judged says why in `note`.
    """

    name: str
    shape: tuple[int, ...]
    error: float
    noise: float
    scale: float
    error64: float
    same: bool
    judged: bool = True
    note: str = ""
    layer: str = ""  # the type of the layer that made it, where that is known
    statistics: Statistics | None = None

    @property
    def ratio(self) -> float:
        """Error as a multiple of what rounding explains; above 8 is different."""
        floor = max(self.noise, FLOOR * self.scale)
        return self.error / floor if floor else float(self.error > 0)
