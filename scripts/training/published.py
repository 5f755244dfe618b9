"""The pretrained weights that are shipped: which they are, and how their scores are found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import zoo
from training.description import make_job
from training.games import EPISODES, GAMES, evaluate
from training.score import Score
from training.tasks import find
from zoo.registry import get

NAMES = (
    "binary_mlp.cancer",
    "mlp_10_20_10_1.diabetes",
    "mnist_cnn.digits",
    "lstm_tagger.digits",
    "transformer_tiny.sums",
    "switch_tiny.brackets",
    "bert_tiny.topics",
    "wavenet_small.tones",
    "dqn_cartpole.cartpole",
    "sac.pendulum",
)
FRAMEWORK, SEED = "torch", 0


def command(name: str) -> str:
    """What trained them, as it is typed."""
    return f"scripts/train {name} --framework {FRAMEWORK} --seed {SEED}"


def where(name: str) -> Path:
    """The weights' place in their family's folder; the card lies beside them, as .json."""
    models = Path(zoo.__file__).parent / "models"
    return models / get(name).model.name / "weights" / f"{name}.safetensors"


def agree(a: Score, b: Score) -> bool:
    """Counts exactly, real values within the interval of either."""
    if a.count is not None:
        return (a.count, a.n) == (b.count, b.n)
    return a.n == b.n and a.low <= b.value <= a.high and b.low <= a.value <= b.high


def score(name: str, framework: str, source: str | Path | None = None) -> Score:
    """The held-out score of pretrained weights (or of `source`), computed in float64."""
    if framework == "torch":
        return _score(name, framework, source or name)
    import jax

    with jax.enable_x64(True):
        return _score(name, framework, source or name)


def _score(name: str, framework: str, source: str | Path) -> Score:
    module = zoo.load(source, framework=framework, param_dtype="float64")
    if name in GAMES:
        return evaluate(GAMES[name].environment, _actor(module, framework), EPISODES)
    job = make_job(find(name), framework)
    results = [(_outputs(module, job.model, framework, b.inputs), b) for b in job.test_batches()]
    return job.task.score(results)


def _outputs(module: Any, model: Any, framework: str, inputs: Any) -> dict[str, np.ndarray]:
    if framework == "torch":
        from training.loop_torch import evaluate as run

        return run(module, inputs)
    from training.loop_flax import evaluator

    return evaluator(model, module, "float64")(inputs)


def _actor(module: Any, framework: str) -> Any:
    """obs (B, O) -> actions (B,) or (B, A)."""
    if framework == "torch":
        import torch

        def act(obs: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return module.act(torch.from_numpy(obs)).numpy()

        return act
    import jax
    from flax import nnx

    graph, state = nnx.split(module)
    call = jax.jit(lambda state, obs: nnx.merge(graph, state).act(obs))
    return lambda obs: np.asarray(call(state, obs))
