"""What a verification found. docs/report.md describes the JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FLOOR = 2.0**-23  # of the scale: float32's own resolution
LEVELS = ("bits", "outputs", "gradients", "training")
Level = Literal["bits", "outputs", "gradients", "training"]
FORMAT = 1  # of the JSON


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """One tensor that is not the same on both sides."""

    name: str  # canonical
    why: str
    count: int = 0  # elements that differ
    max_error: float | None = None
    mean_error: float | None = None
    first: tuple[int, ...] | None = None  # index of the first element that differs
    diagnosis: str | None = None  # what would make it fit: "transposed", "holds the values of ..."


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


@dataclass(frozen=True, slots=True)
class Training:
    """A few optimizer steps from the same state on the same batches."""

    optimizer: str  # "SGD", "momentum", "Adam", "AdamW"
    steps: int
    learning_rate: float
    # "a float32", "b float32", "a float64", "b float64" -> the loss before each step and after all
    losses: dict[str, list[float]]
    rows: list[Row]  # the loss curve, then every parameter and running statistic after the steps


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first place at which two models part, everything before it being right."""

    layer: str  # dotted torch name
    diagnosis: str  # a sentence: what differs there, with the values that fit
    cause: str  # a word for machines: "epsilon", "gelu", ...; "unknown" where nothing known fits
    advice: str  # what to try
    direction: Literal["forward", "backward", "training"] = "forward"
    flax_layer: str | None = None  # dotted path on the other side
    # Where the code between two layers differs: the layers before and after.
    between: tuple[str, str] | None = None
    tensor: str | None = None  # the parameter that is at fault, where one is
    error: float = 0.0
    noise: float = 0.0
    scale: float = 0.0

    @property
    def ratio(self) -> float:
        """Error as a multiple of what rounding explains."""
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
    outputs: list[Row] = field(default_factory=list)  # in the order of execution
    gradients: list[Row] = field(default_factory=list)
    training: list[Training] = field(default_factory=list)
    first_divergence: Divergence | None = None
    notices: list[str] = field(default_factory=list)
    model: str | None = None  # title of the zoo's model, if it is one
    config: dict[str, Any] = field(default_factory=dict)
    certificate: dict[str, Any] | None = None  # of the conversion that made one of the two
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""  # what was run
    created: str = ""
    seconds: float = 0.0

    @property
    def rows(self) -> list[Row]:
        """Every row of every level, in order."""
        return [
            *self.outputs,
            *self.gradients,
            *(row for training in self.training for row in training.rows),
        ]

    @property
    def verdict(self) -> Literal["same", "different"]:
        """ "same" only where every tensor and every judged row is."""
        same = not self.differences and all(row.same for row in self.rows if row.judged)
        return "same" if same else "different"

    @property
    def worst(self) -> Row | None:
        """The output farthest beyond its noise."""
        return max(self.outputs, key=lambda row: row.ratio, default=None)

    def to_dict(self) -> dict[str, Any]:
        """As data for JSON: infinite and undefined numbers are null."""
        data = {"format": FORMAT, "verdict": self.verdict, **asdict(self)}
        lists = [(data["outputs"], self.outputs), (data["gradients"], self.gradients)]
        for made, training in zip(data["training"], self.training, strict=True):
            lists.append((made["rows"], training.rows))
        for made, rows in lists:
            for item, row in zip(made, rows, strict=True):
                item["ratio"] = row.ratio
        if self.first_divergence is not None:
            data["first_divergence"]["ratio"] = self.first_divergence.ratio
        return _finite(data)  # type: ignore[no-any-return]

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
