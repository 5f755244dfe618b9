"""What a task is: one description, from which both frameworks train alike.

Everything that could make two runs differ is decided here, in NumPy: the examples, their order, the
masks, the weights of the loss. The frameworks only compute. Dropout is off in every task (the
presets' rates are overridden by zero), because two frameworks cannot draw the same masks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from training.score import Score
from zoo.containers.errors import UsageError
from zoo.model import Config, Model, override
from zoo.registry import get

Arrays = Mapping[str, np.ndarray]
Kind = Literal["mse", "bce", "bce_logits", "cross_entropy", "value"]
Schedule = Literal["constant", "cosine", "linear", "warmup"]


@dataclass(frozen=True)
class Term:
    """One part of a loss: `scale` times the weighted sum over elements of `kind`.

    `output` is the field of the model's output (empty: the output itself). "bce" takes
    probabilities, "bce_logits" and "cross_entropy" take logits, "value" adds the output as it is.
    """

    kind: Kind
    output: str = ""
    target: str = "target"
    scale: float = 1.0


@dataclass(frozen=True)
class Batch:
    """Inputs by the names of the model's arguments, in PyTorch's order of axes; targets and the
    weights of their elements. The weights of one target sum to one over the whole batch: the parts
    that several processes compute then add up to the loss of the whole."""

    inputs: Arrays
    targets: Arrays
    weights: Arrays = field(default_factory=dict)  # by target; left out: all alike
    axis: int = 0  # of the examples, in the inputs
    target_axis: int = 0  # and in the targets

    def weight(self, target: str) -> np.ndarray:
        """The weights of one target's elements, float64."""
        if target in self.weights:
            return self.weights[target]
        return np.full(self.targets[target].shape, 1 / self.targets[target].size)

    def part(self, rank: int, world: int) -> Batch:
        """What one of `world` processes gets. UsageError where it cannot be divided."""
        size = next(iter(self.inputs.values())).shape[self.axis]
        if size % world:
            raise UsageError(
                f"a batch of {size} cannot be divided among {world}",
                f"give a --batch-size that is a multiple of {world}",
            )
        rows = np.arange(size // world) + rank * (size // world)

        def cut(arrays: Arrays, axis: int) -> dict[str, np.ndarray]:
            return {k: np.take(v, rows, axis) for k, v in arrays.items()}

        at = self.target_axis
        weights = cut({target: self.weight(target) for target in self.targets}, at)
        return Batch(cut(self.inputs, self.axis), cut(self.targets, at), weights, self.axis, at)


@dataclass(frozen=True)
class Data:
    """Examples on axis 0, for training and held out, and how some of them become a batch."""

    train: Arrays
    test: Arrays
    # (rows of `train` or `test`, a generator for what is random in a batch) -> Batch
    batch: Callable[[Arrays, np.random.Generator], Batch]
    fields: Mapping[str, Any] = field(default_factory=dict)  # of the config, that the data decide

    def size(self, part: str) -> int:
        """Number of examples of "train" or "test"."""
        return len(next(iter(getattr(self, part).values())))


@dataclass(frozen=True)
class Task:
    """`name` is `preset.tag`. `data(config, folder)` gives the examples; `score` judges outputs."""

    name: str
    summary: str
    data: Callable[[Config, Path | None], Data]
    terms: tuple[Term, ...]
    # [(outputs, batch)] of the held-out examples, outputs by name in PyTorch's order of axes
    score: Callable[[list[tuple[dict[str, np.ndarray], Batch]]], Score]
    licence: str  # where the data come from, and on what terms
    overrides: Mapping[str, Any] = field(default_factory=dict)
    optimizer: str = "Adam"
    rate: float = 1e-3
    schedule: Schedule = "constant"
    batch_size: int = 32
    steps: int = 1000
    local: bool = False  # whether the user brings the data, with --data
    notes: str = ""

    @property
    def preset(self) -> str:
        """The preset that is trained."""
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Job:
    """A task with everything settled: what one run is made of."""

    task: Task
    data: Data
    model: Model
    config: Config
    framework: str
    optimizer: str
    rate: float
    schedule: Schedule
    batch_size: int
    steps: int
    seed: int = 0
    dtype: str = "float32"  # float32, float64, or bfloat16: computation in it, float32 weights
    devices: int = 1

    @property
    def param_dtype(self) -> str:
        """What the weights are in."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def steps_per_epoch(self) -> int:
        """A last batch that is not full is left out, so that all batches are of one size."""
        return self.data.size("train") // self.batch_size

    def rate_at(self, step: int) -> float:
        """The learning rate of the step with this number, from 0."""
        return self.rate * schedule(self.schedule, step / self.steps)

    def batch(self, step: int) -> Batch:
        """The batch of a step: the same in both frameworks, and after a resumption."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.data.size("train"))
        rows = order[within * self.batch_size :][: self.batch_size]
        return self._batch(self.data.train, rows, np.random.default_rng([self.seed, 1, step]))

    def test_batches(self) -> list[Batch]:
        """The held-out examples, whole; what is random in them does not depend on the seed."""
        n = self.data.size("test")
        size = n if n <= 1024 else 256  # at once where they are few: JAX compiles once a shape
        return [
            self._batch(
                self.data.test, np.arange(at, min(at + size, n)), np.random.default_rng([0, 2, at])
            )
            for at in range(0, n, size)
        ]

    def _batch(self, part: Arrays, rows: np.ndarray, rng: np.random.Generator) -> Batch:
        return self.data.batch({k: v[rows] for k, v in part.items()}, rng)


def schedule(name: Schedule, done: float) -> float:
    """The factor of the learning rate when the share `done` of all steps is behind."""
    if name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(done, 1)))
    if name == "linear":
        return max(1 - done, 0)
    if name == "warmup":  # a tenth of the way up, then down as a cosine
        return 10 * done + 0.01 if done < 0.1 else schedule("cosine", (done - 0.1) / 0.9)
    return 1.0


def make_job(
    task: Task,
    framework: str,
    *,
    folder: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    epochs: int | None = None,
    **settings: Any,
) -> Job:
    """The job of a task; `settings` left out or None are the task's own. UsageError for a
    config or numbers that do not go."""
    if task.local and folder is None:
        raise UsageError(
            f"{task.name} has no data of its own: {task.licence}", "give the directory: --data DIR"
        )
    if not task.local and folder is not None:
        raise UsageError(f"{task.name} brings its own data", "leave out --data")
    found = get(task.preset)
    config = override(found.config, {**task.overrides, **(overrides or {})})
    data = task.data(config, folder)
    config = override(config, data.fields)
    own = {name: getattr(task, name) for name in _SETTINGS}
    own |= {name: value for name, value in settings.items() if value is not None}
    job = Job(task, data, found.model, config, framework, **own)
    _check(job)
    if epochs is not None:
        job = dataclasses.replace(job, steps=epochs * job.steps_per_epoch)
    return job


_SETTINGS = ("optimizer", "rate", "schedule", "batch_size", "steps")


def _check(job: Job) -> None:
    if job.batch_size < 1 or job.steps < 1:
        raise UsageError("--batch-size and --steps are at least 1", "give larger ones")
    if not job.rate > 0:
        raise UsageError(f"a learning rate of {job.rate} learns nothing", "give --lr above 0")
    if not job.steps_per_epoch:
        raise UsageError(
            f"{job.data.size('train')} examples do not fill a batch of {job.batch_size}",
            "give a smaller --batch-size",
        )
