"""The first place at which two models part: what the diagnosis finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from convert.judge.rows import FLOOR


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
