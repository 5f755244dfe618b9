"""Train the pretrained weights again, each by the command in its card, and write them and the card.

Arguments are names; none means all. With --cards the weights that are there are scored anew, and
only their cards are written.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent))

from training import published
from training.games import GAMES
from training.score import Score
from training.tasks import find

import zoo.card
from zoo.card import Card, path_beside
from zoo.containers.errors import NotEquivalent, UsageError, ZooError

TRAIN = Path(__file__).with_name("train.py")


def train(name: str) -> None:
    """Run the command of the card, and put its weights in their place."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, TRAIN, *published.command(name).split()[1:]]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--out", folder, "--quiet"], check=True, env=environment)
        target = published.where(name)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(Path(folder, "model.safetensors"), target)


def describe(name: str) -> Score:
    """Score the weights in both frameworks, and write their card. NotEquivalent if they differ."""
    torch, flax = (published.score(name, framework) for framework in ("torch", "flax"))
    if not published.agree(torch, flax):
        raise NotEquivalent(f"{name}: PyTorch {torch}, Flax {flax}", "find out why")
    path = path_beside(published.where(name))
    path.write_text(card(name, torch).to_json())
    return torch


def card(name: str, score: Score) -> Card:
    """What whoever loads them should know."""
    task = GAMES[name] if name in GAMES else find(name)
    what = HELD_OUT["game" if name in GAMES else "data"]
    notes = f"; {task.notes}" if task.notes else ""
    return Card(
        name=name,
        summary=task.summary,
        data=task.licence,
        license="Apache-2.0",
        score=zoo.card.Score(
            score.metric, score.value, score.low, score.high, score.n, score.count,
            on=f"{what}; interval: {score.interval}{notes}",
        ),
        seed=published.SEED,
        command=published.command(name),
        sha256=hashlib.sha256(published.where(name).read_bytes()).hexdigest(),
        created=datetime.datetime.now(datetime.UTC).date().isoformat(),
        versions={
            "python": platform.python_version(),
            **{p: version(p) for p in ("torch", "jax", "flax", "numpy", "zooconvert")},
        },
    )  # fmt: skip


HELD_OUT = {
    "data": "held-out examples, always the same ones; computed in float64",
    "game": "episodes from seeds that training never used, greedy policy; computed in float64",
}


def main() -> int:
    arguments = [a for a in sys.argv[1:] if a != "--cards"]
    try:
        if unknown := [name for name in arguments if name not in published.NAMES]:
            raise UsageError(
                f"{unknown[0]!r} is not published", f"there are {', '.join(published.NAMES)}"
            )
        for name in arguments or published.NAMES:
            if "--cards" not in sys.argv:
                train(name)
            print(f"{name}: {describe(name)}", flush=True)
    except ZooError as e:
        print(f"error: {e.problem}\ntry: {e.advice}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
