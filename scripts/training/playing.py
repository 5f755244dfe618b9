"""Training by playing: DQN on CartPole, SAC on Pendulum.

A resumed game goes on with its networks, optimizers and step count; the replay buffer is not in a
checkpoint, and is filled anew by the policy before updates go on.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from training import checkpoints
from training.games import EPISODES, GAMES, Episodes, Play, evaluate, settle
from training.run import Result, check_finite, tensorboard
from zoo.model import override


def agent(settled: Play) -> Any:
    """The agent of the framework: acts, updates, saves."""
    if settled.framework == "torch":
        from training import agents_torch as agents
    else:
        from training import agents_flax as agents  # type: ignore[no-redef]
    return {"dqn": agents.DQN, "sac": agents.SAC}[settled.game.kind](settled)


def play(
    name: str,
    framework: str,
    overrides: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    out: Path | None = None,
    resume: Path | None = None,
    every: int | None = None,
    log_dir: Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
    episodes: int = EPISODES,
) -> Result:
    """Train by playing; the losses are those of the (critic's) updates. As `run.run` otherwise."""
    started = time.perf_counter()
    settled = settle(GAMES[name], framework, overrides, **settings)
    game, job = settled.game, settled.job
    player = agent(settled)
    first = player.resume(resume) if resume else 0
    result = Result(first=first)
    every = every or max(game.steps // 10, 1)
    place = out / f"checkpoint{checkpoints.SUFFIX[framework]}" if out else None
    episode = Episodes(game, job.seed)
    with tensorboard(log_dir) as log:
        for step in range(first, game.steps):
            ended = episode.step(player, step, random=step - first < game.starts and not resume)
            if ended is not None:
                log(step, {"return": ended})
            if step - first >= game.starts and step % game.every == 0:
                for i in range(game.updates):
                    count = len(result.losses)
                    loss, *others = player.update(episode.draw(), count, game.rate_at(step))
                    check_finite(loss, step)
                    result.losses.append(loss)
                    if i == 0:
                        log(step, {"loss": loss, **{f"loss {k}": v for k, v in enumerate(others)}})
            if on_step:
                on_step(step, result.losses[-1] if result.losses else float("nan"))
            if place and ((step + 1) % every == 0 or step + 1 == game.steps):
                player.save(place, step + 1)
    result.score = evaluate(game.environment, player.act, episodes)
    result.seconds = time.perf_counter() - started
    if out:
        write(out, settled, player, result)
    return result


def write(out: Path, settled: Play, player: Any, result: Result) -> None:
    """The weights without target networks, which only training needs, and the curve."""
    bare = dataclasses.replace(settled.job, config=override(settled.job.config, {"target": False}))
    checkpoints.write_weights(out / "model.safetensors", bare, player.weights())
    told = dataclasses.asdict(settled.game) | {"seed": settled.job.seed, "dtype": settled.dtype}
    data = {**told, "framework": settled.framework, **result.to_json()}
    checkpoints.write_text(out / "curve.json", json.dumps(data) + "\n")
