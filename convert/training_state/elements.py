"""A transformation's updates beside what torch's rule makes of the same values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.training_state.rule import Rule

TOLERANCE = 8 * 2.0**-23  # hyper-parameters may be held as float32 arrays


@dataclass
class Elements:
    """All elements of the parameters of one group in a row: float64 arrays of one length."""

    names: np.ndarray  # of the parameter that each is of
    u: np.ndarray  # updates
    g: np.ndarray  # gradients
    p: np.ndarray  # parameters
    t: np.ndarray  # the number of this update, 1 for the first
    slots: dict[str, np.ndarray]

    def only(self, pick: np.ndarray) -> Elements:
        """Some of them, by mask or by indices."""
        slots = {slot: values[pick] for slot, values in self.slots.items()}
        u, g, p, t = (x[pick] for x in (self.u, self.g, self.p, self.t))
        return Elements(self.names[pick], u, g, p, t, slots)


def against(
    elements: Elements, rule: Rule, options: Mapping[str, Any], rate: Any = None
) -> tuple[Any, np.ndarray]:
    """The factor between the updates and the rule's, and which elements have another.

    The factor is `rate` where that is given. An option that is a column of values gives a row of
    both for each.
    """
    assert rule.update is not None
    u = elements.u
    with np.errstate(all="ignore"):
        found, _ = rule.update(options, dict(elements.slots), elements.t, elements.g, elements.p)
        d = np.asarray(found, np.float64)
        if rate is None:
            ratio = np.where(d != 0, -u / d, np.nan)
            ratio[~np.isfinite(ratio)] = np.nan
            ratio[np.isnan(ratio).all(axis=-1)] = 0.0
            rate = np.nanmedian(ratio, axis=-1, keepdims=ratio.ndim > 1)
        off = np.abs(u + rate * d)
        bad = ~(off <= TOLERANCE * np.maximum(np.abs(u), np.abs(rate * d)))
    return rate, bad
