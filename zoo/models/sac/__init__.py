"""SAC: a squashed Gaussian actor and twin critics (Haarnoja 2018), as stable-baselines3 has it."""

from __future__ import annotations

import numpy as np

from zoo import probe
from zoo.model import Model
from zoo.models.sac.config import PRESETS, TINY, Config
from zoo.models.sac.layout import infer, layout


def inputs(c: Config) -> dict[str, np.ndarray]:
    """Three observations, and an action between -1 and 1 for each."""
    return {
        "obs": probe.normal("obs", (3, c.obs_size)),
        "action": np.tanh(probe.normal("action", (3, c.action_size))),
    }


MODEL = Model(
    name="sac",
    version=1,
    summary="soft actor-critic: squashed Gaussian actor, twin critics (Haarnoja 2018)",
    config=Config,
    presets=PRESETS,
    tiny=TINY,
    layout=layout,
    infer=infer,
    inputs=inputs,
    torch="zoo.models.sac.model_torch:SACPolicy",
    flax="zoo.models.sac.model_flax:SACPolicy",
    structure=frozenset({"target"}),
)
