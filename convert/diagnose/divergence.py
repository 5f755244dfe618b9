"""The first place at which two models part: what the diagnosis finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from convert.diagnose.causes import Reason
from convert.judge.noise import EXACT, MARGIN
from convert.judge.rows import FLOOR, Row


class Judged:
    """An error, and whether rounding explains it."""

    def __init__(self, error: float, noise: float, scale: float, precision: str) -> None:
        self.error, self.noise, self.scale = error, noise, scale
        self.tolerance = (
            EXACT * scale if precision == "float64" else MARGIN * max(noise, FLOOR * scale)
        )

    @property
    def same(self) -> bool:
        """Whether there is nothing to explain."""
        return self.error <= self.tolerance


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first place at which two models part, everything before it being right."""

    layer: str  # dotted torch name
    diagnosis: str  # a sentence: what differs there, with the values that fit
    cause: str  # a word of causes.CAUSES: "epsilon", ...; "unknown" where nothing known fits
    advice: str  # what to try
    direction: Literal["forward", "backward", "training"] = "forward"
    flax_layer: str | None = None  # dotted path on the other side
    # Where the code between two layers differs: the layers before and after.
    between: tuple[str, str] | None = None
    tensor: str | None = None  # the parameter that is at fault, where one is
    source: str | None = None  # file and line of torch's expression that differs, where it is known
    flax_source: str | None = None  # of Flax's code that computes something else there
    error: float = 0.0
    noise: float = 0.0
    scale: float = 0.0

    @classmethod
    def of(cls, layer: str, reason: Reason, judged: Judged | Row, **fields: Any) -> Divergence:
        """A divergence at a layer, with its reason; `fields` are those of this class."""
        return cls(
            layer, reason.diagnosis, reason.cause, reason.advice,
            error=judged.error, noise=judged.noise, scale=judged.scale,
            **{"tensor": reason.tensor} | fields,
        )  # fmt: skip

    @property
    def ratio(self) -> float:
        """Error as a multiple of what rounding explains."""
        floor = max(self.noise, FLOOR * self.scale)
        return self.error / floor if floor else float(self.error > 0)
