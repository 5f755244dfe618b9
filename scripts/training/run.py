"""One run: steps, logs, checkpoints, the score at the end."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from training import checkpoints
from training.description import Job
from training.score import Score
from zoo.containers.errors import UsageError, ZooError


@dataclass
class Result:
    """What a run gave. `losses[i]` is the loss at step `first + i`, before its update."""

    losses: list[float] = field(default_factory=list)
    first: int = 0
    score: Score | None = None
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        score = self.score.to_json() if self.score else None
        return {
            "first": self.first,
            "losses": self.losses,
            "score": score,
            "seconds": round(self.seconds, 2),
        }


def trainer(job: Job) -> Any:
    """The loop of the job's framework."""
    if job.framework == "torch":
        from training.loop_torch import Trainer
    else:
        from training.loop_flax import Trainer  # type: ignore[assignment]
    return Trainer(job)


def run(
    job: Job,
    *,
    out: Path | None = None,
    resume: Path | None = None,
    log_dir: Path | None = None,
    every: int | None = None,
    stop: int | None = None,
    score: bool = True,
    on_step: Callable[[int, float], None] | None = None,
) -> Result:
    """Train from the start, or from the checkpoint `resume`, up to `job.steps` or to step `stop`.

    With `out`: the checkpoint every `every` steps (None: ten times) and at the end, the weights,
    the curve. Raises ZooError where the loss is no longer a number.
    """
    started = time.perf_counter()
    loop = trainer(job)
    try:
        first = loop.resume(resume) if resume else 0
        result = Result(first=first)
        last = min(stop or job.steps, job.steps)
        every = every or max(job.steps // 10, 1)
        place = out / f"checkpoint{checkpoints.SUFFIX[job.framework]}" if out else None
        with tensorboard(log_dir if loop.rank == 0 else None) as log:
            for step in range(first, last):
                rate = job.rate_at(step)
                loss = loop.step(job.batch(step), rate)
                check_finite(loss, step)
                result.losses.append(loss)
                log(step, {"loss": loss, "learning rate": rate})
                if on_step:
                    on_step(step, loss)
                if place and ((step + 1) % every == 0 or step + 1 == last):
                    loop.save(place, step + 1)
            if score and loop.rank == 0:
                results = [(loop.predict(b), b) for b in job.test_batches()]
                result.score = job.task.score(results)
                log(last, {f"held out/{result.score.metric}": result.score.value})
        result.seconds = time.perf_counter() - started
        if out and loop.rank == 0:
            checkpoints.write_weights(out / "model.safetensors", job, loop.weights())
            write_curve(out / "curve.json", job, result)
        loop.wait()
        return result
    finally:
        loop.close()


def write_curve(path: Path, job: Job, result: Result) -> None:
    """The curve and what it is of, as JSON."""
    names = "framework", "optimizer", "rate", "schedule", "batch_size", "steps", "seed", "dtype"
    settings = {name: getattr(job, name) for name in names}
    data = {"task": job.task.name, **settings, **result.to_json()}
    checkpoints.write_text(path, json.dumps(data) + "\n")


def check_finite(loss: float, step: int) -> None:
    """ZooError where the loss is no longer a number."""
    if not np.isfinite(loss):
        raise ZooError(
            f"the loss is {loss} at step {step}",
            "give a smaller --lr, or --dtype float32 if it was bfloat16",
        )


@contextlib.contextmanager
def tensorboard(folder: Path | None) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """What logs values at a step, into `folder`; with None it does nothing."""
    if folder is None:
        yield lambda step, values: None
        return
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UsageError("--log-dir needs tensorboardX", "pip install tensorboardX") from None
    with SummaryWriter(str(folder)) as writer:

        def log(step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        yield log
