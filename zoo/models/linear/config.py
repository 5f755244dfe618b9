"""What a model of one linear map is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FORMS = ("scalar", "matrix")


@dataclass(frozen=True)
class Config:
    """Defaults are those of linear_3x3."""

    form: Literal["scalar", "matrix"] = "matrix"  # parameters `w`, `b`, or `weight`, `bias`
    in_features: int = 3
    out_features: int = 3

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form {self.form!r} is none of {', '.join(FORMS)}")
        if self.form == "scalar" and (self.in_features, self.out_features) != (1, 1):
            raise ValueError("a scalar map is of one feature to one feature")


PRESETS = {
    "linear_regression": Config(form="scalar", in_features=1, out_features=1),
    "linear_3x3": Config(),
}

TINY = {
    "scalar": PRESETS["linear_regression"],
    "square": PRESETS["linear_3x3"],
    "wide": Config(in_features=5, out_features=2),
}
