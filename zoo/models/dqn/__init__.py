"""DQN: a value for every action (Mnih 2015), under the names of stable-baselines3."""

from __future__ import annotations

import numpy as np

from zoo import probe
from zoo.model import Model
from zoo.models.dqn.config import PRESETS, TINY, Config
from zoo.models.dqn.layout import infer, layout


def inputs(c: Config) -> dict[str, np.ndarray]:
    """Three observations, as floats: images already scaled."""
    return {"obs": probe.normal("obs", (3, *c.obs_shape))}


MODEL = Model(
    name="dqn",
    version=1,
    summary="deep Q-network on images or vectors (Mnih 2015)",
    config=Config,
    presets=PRESETS,
    tiny=TINY,
    layout=layout,
    infer=infer,
    inputs=inputs,
    torch="zoo.models.dqn.model_torch:DQNPolicy",
    flax="zoo.models.dqn.model_flax:DQNPolicy",
    images=("obs", "*.features_extractor.cnn.[0-5]"),
    structure=frozenset({"target"}),
)
