"""A zoo of models, each written twice, in PyTorch and in Flax NNX, with one canonical layout.

    zoo.names("resnet*")                               presets whose name matches
    zoo.get("minilm_l6")                               its Model, Config and weights
    zoo.create("minilm_l6", framework="flax", seed=0)  fresh weights
    zoo.load("path/or/name", framework="torch")        a checkpoint's weights, ready to use
    zoo.identify("path")                               what a checkpoint is

Importing this imports no framework, and neither does anything that reads only names and shapes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.checkpoint.identification import Identity, identify
    from zoo.containers.errors import ZooError
    from zoo.loading import LoadNotice, create, load
    from zoo.model import Model
    from zoo.registry import get, names

_WHERE = {
    "ZooError": "zoo.containers.errors",
    "LoadNotice": "zoo.loading",
    "create": "zoo.loading",
    "load": "zoo.loading",
    "Model": "zoo.model",
    "Identity": "zoo.checkpoint.identification",
    "identify": "zoo.checkpoint.identification",
    "get": "zoo.registry",
    "names": "zoo.registry",
}
__all__ = [
    "Identity",
    "LoadNotice",
    "Model",
    "ZooError",
    "create",
    "get",
    "identify",
    "load",
    "names",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")
