"""What a verification found. docs/report.md describes the JSON."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from convert.compare.blind_spots import BlindSpot
from convert.diagnose.divergence import Divergence
from convert.judge.bits import TensorDifference
from convert.judge.rows import Row

FORMAT = 1  # of the JSON


@dataclass(frozen=True, slots=True)
class Training:
    """A few optimizer steps from the same state on the same batches."""

    optimizer: str  # "SGD", "momentum", "Adam", "AdamW"
    steps: int
    learning_rate: float
    # "a float32", "b float32", "a float64", "b float64" -> the loss before each step and after all
    losses: dict[str, list[float]]
    rows: list[Row]  # the loss curve, then every parameter and running statistic after the steps


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
    # Each paired leaf layer by itself, fed torch's own inputs, in float64.
    layers: list[Row] = field(default_factory=list)
    gradients: list[Row] = field(default_factory=list)
    training: list[Training] = field(default_factory=list)
    first_divergence: Divergence | None = None
    blind_spots: list[BlindSpot] = field(default_factory=list)  # what the verdict does not cover
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
            *self.layers,
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
        lists = [(data[k], getattr(self, k)) for k in ("outputs", "layers", "gradients")]
        for made, training in zip(data["training"], self.training, strict=True):
            lists.append((made["rows"], training.rows))
        for made, rows in lists:
            for item, row in zip(made, rows, strict=True):
                item["ratio"] = row.ratio
        if self.first_divergence is not None:
            data["first_divergence"]["ratio"] = self.first_divergence.ratio
        return _finite(data)  # type: ignore[no-any-return]

    def __str__(self) -> str:
        """What the command line prints."""
        room = importlib.import_module("convert.compare.summary_text")  # which imports this module
        return str(room.text(self))

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        room = importlib.import_module("convert.compare.notebook")  # likewise
        return str(room.cell(self))

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
