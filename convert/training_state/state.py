"""An optimizer's state in canonical form: torch's meaning, keyed by canonical parameter names.

Whatever a framework scales or derives is undone before it gets here, so that a state read from
either side means the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

UNCOUNTED = "the checkpoint does not count its updates"


@dataclass
class Group:
    """Parameters that share their hyper-parameters: one of torch's param groups."""

    params: tuple[str, ...]  # canonical names
    # torch's names: lr, betas, eps, weight_decay, ...; None, or no key, where nothing tells.
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class OptimizerState:
    """The state of one optimizer.

    `rule` is torch's class name ("SGD", "Adam", "AdamW", "RMSprop", ...; see `rules`). `slots` are
    torch's names of what is kept for a parameter ("exp_avg", "momentum_buffer", ...), each an array
    of the canonical shape, or a scalar ("mu_product"). `steps` counts the updates a parameter has
    had. A parameter without state (frozen, or never stepped) is in a group but in no slot.
    """

    rule: str
    groups: list[Group]
    # slot -> canonical name -> values; read from a file, it may be read anew at each look (`lazy`)
    slots: Mapping[str, Mapping[str, np.ndarray]]
    steps: dict[str, int]  # canonical name -> updates so far
    name: str = ""  # of one among several: "actor"
    notices: list[str] = field(default_factory=list)

    @property
    def params(self) -> tuple[str, ...]:
        """All parameters, group after group."""
        return tuple(name for group in self.groups for name in group.params)


@dataclass
class TrainingState:
    """Everything in a training checkpoint that is not the weights."""

    optimizers: list[OptimizerState] = field(default_factory=list)
    ema: Mapping[str, np.ndarray] = field(default_factory=dict)  # canonical name -> average
    data: Mapping[str, Any] = field(default_factory=dict)  # epoch, step, ...: anything JSON holds
    notices: list[str] = field(default_factory=list)
