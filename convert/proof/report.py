"""What a verification found."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FLOOR = 2.0**-23  # of the scale: float32's own resolution
LEVELS = ("bits", "outputs")
Level = Literal["bits", "outputs"]


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """One tensor that is not the same on both sides."""

    name: str  # canonical
    why: str
    count: int = 0  # elements that differ
    max_error: float | None = None
    mean_error: float | None = None
    first: tuple[int, ...] | None = None  # index of the first element that differs


@dataclass(frozen=True, slots=True)
class OutputRow:
    """One output or intermediate, float32 against float32, beside its rounding noise.

    `noise` is the largest difference between float32 and float64 in the PyTorch twin, `scale` its
    largest value. Same means `error <= 8 max(noise, 2^-23 scale)` and, in float64,
    `error64 <= 1e-10 scale`.
    """

    name: str
    shape: tuple[int, ...]
    error: float
    noise: float
    scale: float
    error64: float
    same: bool

    @property
    def ratio(self) -> float:
        """Error as a multiple of what rounding explains; above 8 is different."""
        floor = max(self.noise, FLOOR * self.scale)
        return self.error / floor if floor else float(self.error > 0)


@dataclass
class Report:
    """The verdict, and what it stands on."""

    a: str
    b: str
    level: str
    compared: int = 0  # tensors
    nbytes: int = 0
    differences: list[TensorDifference] = field(default_factory=list)
    outputs: list[OutputRow] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> Literal["same", "different"]:
        """ "same" only where every tensor and every output is."""
        same = not self.differences and all(row.same for row in self.outputs)
        return "same" if same else "different"

    @property
    def worst(self) -> OutputRow | None:
        """The output farthest beyond its noise."""
        return max(self.outputs, key=lambda row: row.ratio, default=None)

    def to_dict(self) -> dict[str, Any]:
        """As data for JSON."""
        data = asdict(self)
        for row, output in zip(data["outputs"], self.outputs, strict=True):
            row["ratio"] = output.ratio
        return {"verdict": self.verdict, **data}

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(self.to_dict(), indent=1)
