"""The proof that training crosses the border: which cases there are, and what is measured of each.

For a case: 100 steps in PyTorch, 100 in Flax, 50 and 50 either way round; in float64 every switched
loss within 1e-9 of PyTorch's, in float32 within 8 times the gap that PyTorch's own float32 has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from training.curves import curve, judge32, judge64
from training.optimizers import RECIPES

STEPS, AT = 100, 50
TORCH, FLAX = "torch", "flax"


@dataclass(frozen=True)
class Case:
    """A task with an optimizer, small enough to be measured again and again."""

    name: str
    task: str
    optimizer: str
    rate: float
    overrides: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 16

    @property
    def judged32(self) -> bool:
        """Whether its float32 is judged: stock optax's Adam rounds more than PyTorch's."""
        return not self.optimizer.endswith("_stock")

    def curve(self, *legs: tuple[str, int], dtype: str, steps: int) -> np.ndarray:
        """The losses of these legs (see `curves.curve`)."""
        return curve(
            self.task,
            legs,
            steps=steps,
            dtype=dtype,
            optimizer=self.optimizer,
            rate=self.rate,
            overrides=self.overrides,
            batch_size=self.batch_size,
        )


_RATES = {"SGD": 0.05, "Adadelta": 1.0, "Adagrad": 0.05, "Lion": 1e-3}

OPTIMIZERS = tuple(
    Case(f"mlp, {name}", "mlp_10_20_10_1.synthetic", name, _RATES.get(name, 3e-3))
    for name in RECIPES
)
FAMILIES = tuple(
    Case(f"{family}, AdamW", task, "AdamW", 1e-3, overrides, 8)
    for family, task, overrides in (
        ("resnet", "resnet18.digits", {"width": 4, "layers": (1, 1, 1, 1)}),
        ("recurrent", "lstm_tagger.digits", {}),
        ("bert", "bert_tiny.topics", {"num_hidden_layers": 1}),
        ("switch_transformer", "switch_tiny.brackets", {}),
        ("wavenet", "wavenet_small.tones", {"layers": 4, "dilation_cycle": 4}),
        ("sac", "sac.pendulum", {"pi": (32, 32), "qf": (32, 32)}),
    )
)
CASES = {case.name: case for case in (*OPTIMIZERS, *FAMILIES)}


def lines(case: Case, steps: int = STEPS, at: int = AT, dtype: str = "float64") -> dict[str, Any]:
    """The three curves of a plot, name -> (first step, losses): all PyTorch, all Flax, switched."""
    found = {
        "all PyTorch": case.curve((TORCH, steps), dtype=dtype, steps=steps),
        "all Flax": case.curve((FLAX, steps), dtype=dtype, steps=steps),
        "PyTorch, then Flax": case.curve((TORCH, at), (FLAX, steps), dtype=dtype, steps=steps),
    }
    return {name: (0, losses[:, 0].tolist()) for name, losses in found.items()}


def measure(case: Case, steps: int = STEPS, at: int = AT) -> dict[str, Any]:
    """Every comparison of one case, as plain data; `same` where all are within what is allowed."""
    runs = {
        "flax": ((FLAX, steps),),
        "torch to flax": ((TORCH, at), (FLAX, steps)),
        "flax to torch": ((FLAX, at), (TORCH, steps)),
    }
    exact = case.curve((TORCH, steps), dtype="float64", steps=steps)
    rough = case.curve((TORCH, steps), dtype="float32", steps=steps)
    found: dict[str, Any] = {"optimizer": case.optimizer, "task": case.task, "steps": steps}
    found |= {"at": at, "first": float(exact[0, 0]), "last": float(exact[-1, 0]), "runs": {}}
    for name, legs in runs.items():
        wide = judge64(exact, case.curve(*legs, dtype="float64", steps=steps))
        narrow = judge32(rough, case.curve(*legs, dtype="float32", steps=steps), exact)
        found["runs"][name] = {
            "error64": wide.error,
            "error32": narrow.error,
            "share32": narrow.share,
            "same": bool(wide.same and (narrow.same or not case.judged32)),
            "judged32": case.judged32,
        }
    found["same"] = all(row["same"] for row in found["runs"].values())
    return found
