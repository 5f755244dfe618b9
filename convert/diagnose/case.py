"""A value that is wrong, and what a hypothesis needs to say why."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np

from convert.diagnose.causes import Reason
from convert.matching.alignment import gap
from convert.runtime.torch_calls import again
from convert.runtime.trace import Recorded

LOG = logging.getLogger(__name__)
Found = TypeVar("Found")


@dataclass
class Case:
    """All arrays are float64 with torch's axes.

    `targets` is what Flax gave, in each way in which its axes may lie. A hypothesis predicts it;
    only a prediction that `fits` within the rounding explains it.
    """

    targets: list[np.ndarray]
    right: np.ndarray  # what torch gives
    tolerance: float
    kind: str = "other"
    module: Any = None  # torch's layer, in float64
    call: Recorded | None = None  # of torch's layer
    key: str = ""  # which of its outputs
    flax: Mapping[str, Any] = field(default_factory=dict)  # the Flax layer's settings
    # Values of torch that came before: calls' outputs and inputs, the nearest first.
    past: list[tuple[str, np.ndarray]] = field(default_factory=list)
    masks: list[tuple[str, np.ndarray]] = field(default_factory=list)
    # What Flax's layer gives for other inputs, by torch's names.
    rerun: Callable[[dict[str, np.ndarray]], np.ndarray] | None = None

    def fits(self, prediction: np.ndarray | None) -> bool:
        """Whether Flax gave this, and torch did not: what both gave tells no difference."""
        return (
            prediction is not None
            and not self.is_right(prediction)
            and any(
                t.shape == prediction.shape and gap(prediction, t) <= self.tolerance
                for t in self.targets
            )
        )

    def is_right(self, prediction: np.ndarray | None) -> bool:
        """Whether torch gave this."""
        return prediction is not None and gap(prediction, self.right) <= self.tolerance

    @property
    def target(self) -> np.ndarray:
        """What Flax gave, in the likeliest way."""
        return self.targets[0]

    @property
    def comparable(self) -> bool:
        """Whether both values have one shape."""
        return self.target.shape == self.right.shape

    def input(self, i: int = 0) -> np.ndarray | None:
        """The layer's i-th floating-point input."""
        if self.call is None:
            return None
        floats = [v for v in self.call.inputs.values() if v.dtype.kind == "f"]
        return floats[i].astype(np.float64) if i < len(floats) else None

    def variant(
        self, attributes: Mapping[str, Any] | None = None, tensors: Mapping[str, Any] | None = None
    ) -> np.ndarray | None:
        """What torch's layer would give with other settings or parameters; None if it cannot."""
        if self.module is None or self.call is None:
            return None
        try:
            made = again(changed(self.module, attributes or {}, tensors or {}), self.call)
        except Exception:  # a setting that the layer cannot run with explains nothing
            return None
        return made.get(self.key)


def after(name: str) -> str:
    """Where something is done to one of the values that came before, in words."""
    return f"on {name}" if name.startswith("its input") else f"after {name}"


def changed(module: Any, attributes: Mapping[str, Any], tensors: Mapping[str, Any]) -> Any:
    """A copy of a torch module with other attributes and tensors, sharing all the rest."""
    import torch

    made = copy.copy(module)
    for store in ("_parameters", "_buffers"):
        vars(made)[store] = dict(vars(module)[store])
    for name, value in attributes.items():
        setattr(made, name, value)
    for name, value in tensors.items():
        store = "_buffers" if name in made._buffers else "_parameters"
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(np.ascontiguousarray(value))
        vars(made)[store][name] = value
    if "_flat_weights" in vars(module):
        made._flat_weights = [getattr(made, n) for n in made._flat_weights_names]
    return made


def tensors_of(module: Any) -> dict[str, np.ndarray]:
    """A torch module's own parameters and buffers, float64."""
    own = {**dict(module.named_parameters(recurse=False))}
    own |= dict(module.named_buffers(recurse=False))
    return {n: t.detach().double().numpy() for n, t in own.items() if t.is_floating_point()}


Rule = Callable[[Case], Reason | None]
# What a hypothesis predicts, each prediction with what it would explain.
Candidates = Iterator[tuple[np.ndarray | None, Reason]]


def first(*hypotheses: Callable[[], Found | None]) -> Found | None:
    """What the first hypothesis that holds says; one that raises explains nothing."""
    for hypothesis in hypotheses:
        try:
            if (reason := hypothesis()) is not None:
                return reason
        except Exception:
            LOG.debug("%s failed", hypothesis, exc_info=True)
    return None


def first_fit(case: Case, *hypotheses: Callable[[Case], Candidates]) -> Reason | None:
    """The first reason whose prediction is what Flax gave."""

    def fitting(hypothesis: Callable[[Case], Candidates]) -> Reason | None:
        return next((said for made, said in hypothesis(case) if case.fits(made)), None)

    return first(*(partial(fitting, hypothesis) for hypothesis in hypotheses))
