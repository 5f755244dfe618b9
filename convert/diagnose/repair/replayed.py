"""What edits of a program give, held against what Flax gives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.diagnose.repair.edit import Changes, Edit
from convert.judge.noise import MARGIN
from convert.judge.rows import FLOOR
from convert.matching.alignment import gap
from convert.program.operations import Program
from convert.program.replay import Values, changed, replay
from convert.runtime.arrays import to_numpy
from convert.runtime.torch_calls import copied

NEAR = 50  # times the tolerance: a fault smaller than that may be explained by luck


@dataclass
class Observation:
    """One run of both sides: torch's values at the leaves, and what each made of them."""

    leaves: Values
    targets: list[np.ndarray]  # Flax's value, in each way in which its axes may lie
    right: np.ndarray  # torch's
    tolerance: float

    @property
    def error(self) -> float:
        """How far the two are apart."""
        return min(gap(t, self.right) for t in self.targets)


class Replayed:
    """An observation in which edits are tried. ValueError where the replay of the program does not
    give torch's own values again."""

    def __init__(self, program: Program, sample: Observation) -> None:
        self.program, self.sample = program, sample
        self._leaves: Values = copied(sample.leaves)  # as they came
        self._rough: Values | None = None  # the replay in float32
        self._restore()
        made = _array(self.values.get(program.target))
        if made is None or made.shape != sample.right.shape:
            raise ValueError("the replay does not come to the target")
        if gap(made, sample.right) > max(sample.tolerance, 64 * FLOOR * _scale(made)):
            raise ValueError("the replay gives other values")

    def _restore(self) -> None:
        self.values = replay(self.program, copied(self._leaves))
        self._written = self._versions()

    def _versions(self) -> list[int]:
        """How often each value has been written into."""
        return [t._version for t in self.values.values()]

    def made(self, edit: Edit, changes: Changes | None = None) -> np.ndarray | None:
        """The target with the edit; None where it cannot be computed."""
        made = None
        with contextlib.suppress(Exception):
            made = _array(_edited(self.program, self.values, edit, changes))
        if self._versions() != self._written:  # an operation that writes into what it is given
            self._restore()
            return None
        return made

    def gives(self, edit: Edit, until: Program, known: Callable[[Any], bool]) -> bool:
        """Whether what the edit makes of the target of the program's first operations is known;
        True where it does not come there."""
        if min(edit.changes, default=len(until.operations)) >= len(until.operations):
            return True
        made = None
        with contextlib.suppress(Exception):
            made = _edited(until, self.values, edit)
        if self._versions() != self._written:
            self._restore()
        return made is not None and known(made)

    def error(self, edit: Edit, changes: Changes | None = None) -> float:
        """How far the edit leaves torch from Flax."""
        made = self.made(edit, changes)
        if made is None:
            return float("inf")
        targets = [t for t in self.sample.targets if t.shape == made.shape]
        return min((gap(made, t) for t in targets), default=float("inf"))

    def tolerance(self, edit: Edit, error: float) -> float:
        """The rounding of the edited program, where the error is near that of torch's own."""
        tolerance = self.sample.tolerance
        if not tolerance < error <= NEAR * tolerance or error > 1e-4 * self.sample.error:
            return tolerance
        made = self.made(edit)
        with contextlib.suppress(Exception):
            if self._rough is None:
                self._rough = {}  # where it raises
                self._rough = replay(self.program, copied(self._leaves, "float32"))
            rough = _array(_edited(self.program, self._rough, edit))
            if made is not None and rough is not None:
                return max(tolerance, MARGIN * max(gap(made, rough), FLOOR * _scale(made)))
        return tolerance


def _edited(program: Program, values: Values, edit: Edit, changes: Changes | None = None) -> Any:
    """The target of a program with the edit."""
    leaves = {v: f(values[v]) for v, f in edit.leaves.items()}
    return changed(program, values, changes or edit.changes, leaves)


def _scale(made: np.ndarray) -> float:
    return float(np.abs(made[np.isfinite(made)]).max(initial=0.0))


def _array(tensor: Any) -> np.ndarray | None:
    """A tensor's values in 64 bits."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        return None
    made = to_numpy(tensor)
    return made.astype(np.complex128 if made.dtype.kind == "c" else np.float64, copy=False)
