"""Lion (Chen 2023), as a plugin states an optimizer: torch has none, but several packages do.

Their states agree: `exp_avg` alone, no count; the sign of an average of it and the gradient is
the direction, and weight decay is decoupled.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from convert.training_state.rule import Rule, Stock


def update(
    o: Mapping[str, Any], s: dict[str, Any], t: Any, g: Any, p: Any
) -> tuple[Any, dict[str, Any]]:
    """The rule in NumPy."""
    b1, b2 = o["betas"]
    g = -g if o.get("maximize") else g
    direction = np.sign(b1 * s["exp_avg"] + (1 - b1) * g) + o.get("weight_decay", 0.0) * p
    return direction, {"exp_avg": b2 * s["exp_avg"] + (1 - b2) * g}


def fits(options: Mapping[str, Any], slots: Collection[str]) -> bool:
    """Betas without an epsilon."""
    return "betas" in options and "eps" not in options and set(slots) <= {"exp_avg"}


RULE = Rule(
    "Lion",
    ("exp_avg",),
    frozenset(),
    counts=False,
    needs=("exp_avg",),
    options=("betas", "weight_decay"),
    update=update,
    stock=(Stock({"mu": "exp_avg"}, counts=True, cls="ScaleByLionState"),),
    hyperparams={"b1": "betas.0", "b2": "betas.1", "weight_decay": "weight_decay"},
    transformation="optax.lion",
    fits=fits,
)
