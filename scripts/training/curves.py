"""Loss curves across the border: some steps in one framework, the next ones in the other."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import convert
from training import checkpoints
from training.description import make_job
from training.games import GAMES, noise, recorded, settle
from training.playing import agent
from training.run import run
from training.tasks import find

Leg = tuple[str, int]  # a framework, and the step at which it stops
MARGIN = 8.0  # times torch's own gap between float32 and float64
EXACT = 1e-9  # relative, in float64


def curve(
    name: str,
    legs: Sequence[Leg],
    *,
    steps: int,
    dtype: str = "float64",
    seed: int = 0,
    folder: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    **settings: Any,
) -> np.ndarray:
    """Losses (steps, K) of the task `name`: K is 1, for SAC 2 (critics, actor).

    Each leg trains to its step and writes a checkpoint, which is converted to the framework of the
    next leg, and that one goes on from there. Games learn from recorded transitions of a random
    policy, so that every step is comparable.
    `settings` are those of `description.make_job` and of `games.settle`. The checkpoints stay in
    `folder`, if one is given.
    """
    with tempfile.TemporaryDirectory() as scratch:
        place, found, checkpoint = Path(folder or scratch), [], None
        for i, (framework, stop) in enumerate(legs):
            if checkpoint is not None:
                suffix = ".flax" if framework == "flax" else ".safetensors"
                converted = place / f"{i}{suffix}"
                convert.convert(checkpoint, converted)
                checkpoint = converted
            told = {**settings, "steps": steps, "dtype": dtype, "seed": seed}
            leg = _game if name in GAMES else _supervised
            losses, checkpoint = leg(
                name, framework, overrides or {}, told, place / f"{i}", checkpoint, stop
            )
            found.append(losses)
        return np.concatenate(found)


def _supervised(
    name: str, framework: str, overrides: Mapping[str, Any], settings: dict[str, Any],
    out: Path, resume: Path | None, stop: int,
) -> tuple[np.ndarray, Path]:  # fmt: skip
    job = make_job(find(name), framework, overrides=overrides, **settings)
    result = run(job, out=out, resume=resume, stop=stop, every=job.steps + 1, score=False)
    place = out / f"checkpoint{checkpoints.SUFFIX[framework]}"
    return np.array(result.losses)[:, None], place


def _game(
    name: str, framework: str, overrides: Mapping[str, Any], settings: dict[str, Any],
    out: Path, resume: Path | None, stop: int,
) -> tuple[np.ndarray, Path]:  # fmt: skip
    play = settle(GAMES[name], framework, overrides, **settings)
    player, buffer = agent(play), recorded(play.game, play.job.seed)
    first = player.resume(resume) if resume else 0
    losses = []
    for step in range(first, stop):
        rng = np.random.default_rng([play.job.seed, 9, step])
        batch = buffer.draw(rng, play.game.batch_size)
        batch |= noise(play.game, batch, rng)
        losses.append(player.update(batch, step, play.game.rate_at(step)))
    place = out / f"checkpoint{checkpoints.SUFFIX[framework]}"
    player.save(place, stop)
    return np.array(losses), place


@dataclass(frozen=True)
class Verdict:
    """How far two curves are apart, and how far they may be."""

    error: float  # the largest of |a - b| / |a|
    share: float  # the largest of |a - b| / allowed: at most 1 where they are the same
    allowed: str

    @property
    def same(self) -> bool:
        """Whether every step is within what is allowed."""
        return self.share <= 1


def judge64(reference: np.ndarray, other: np.ndarray) -> Verdict:
    """Two float64 curves: every step within 1e-9 relative."""
    error = float((np.abs(other - reference) / np.abs(reference)).max())
    return Verdict(error, error / EXACT, "1e-9 relative")


def judge32(reference: np.ndarray, other: np.ndarray, exact: np.ndarray) -> Verdict:
    """Two float32 curves: every step within 8 times the widest gap that torch's float32 run
    (`reference`) has had to its float64 run (`exact`) up to that step, and no less than rounding
    of the loss itself (2^-23)."""
    gap = np.maximum.accumulate(np.abs(reference - exact), axis=0)
    allowed = MARGIN * np.maximum(gap, 2.0**-23 * np.abs(exact))
    apart = np.abs(other - reference)
    error = float((apart / np.abs(reference)).max())
    return Verdict(error, float((apart / allowed).max()), "8 times torch's own float32 gap")
