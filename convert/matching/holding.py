"""One side of a match: the tensors of a checkpoint or of a module, read when they are wanted."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convert.runtime.flax_module import as_flax, flax_module
from convert.runtime.torch_layout import ties_of
from convert.runtime.torch_module import state
from convert.tensors import bits_of, info_of
from zoo import hub
from zoo.checkpoint.peel import COLLECTIONS, Left, Peeled, innermost
from zoo.containers import dtypes, open_checkpoint
from zoo.containers.base import TensorInfo
from zoo.containers.errors import UsageError


@dataclass
class MatchSide:
    """`tensors` are by the names that a layout has for them; those of `statistics` move with the
    batch. `notices` say what the side holds besides weights, and what was taken off its names."""

    title: str
    tensors: dict[str, TensorInfo]
    read: Callable[[str], np.ndarray]
    statistics: frozenset[str] | None = None  # None where the side does not tell
    ties: Mapping[str, str] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()  # of a torch module
    notices: tuple[str, ...] = ()


def hold(side: Any, framework: str, stack: ExitStack) -> MatchSide:
    """The side as tensors: a path to a checkpoint of any container, or a module.

    Raises UsageError for what is neither, ZooError for a checkpoint that cannot be read.
    """
    if isinstance(side, str | os.PathLike):
        return _checkpoint(side, framework, stack)
    return _torch(side) if framework == "torch" else _flax(side)


def _checkpoint(path: str | os.PathLike[str], framework: str, stack: ExitStack) -> MatchSide:
    reader = stack.enter_context(open_checkpoint(hub.locate(path)))
    infos = reader.tensors
    level = innermost(infos)
    if any(dtypes.is_float(infos[n].dtype) and _is_key(n) for n in level.set_aside):
        level = Peeled({n: n for n in infos})  # `key` of an attention, not of a generator
    names, statistics = level.names, None
    if framework == "flax" and {n.partition(".")[0] for n in names} <= COLLECTIONS:
        names = {n.partition(".")[2]: s for n, s in level.names.items()}
        moving = (n for n in level.names if n.startswith("batch_stats."))
        statistics = frozenset(n.partition(".")[2] for n in moving)
    back = {s: n for n, s in names.items()}
    return MatchSide(
        str(path),
        {n: infos[s] for n, s in names.items()},
        lambda n: reader.read(names[n]),
        statistics,
        {n: back[t] for n, s in names.items() if (t := reader.ties.get(s, "")) in back},
        notices=(*level.notices(), *Left(level.set_aside).notices()),
    )


def _is_key(name: str) -> bool:
    return "key" in name.split(".")


def _torch(module: Any) -> MatchSide:
    import torch

    if not isinstance(module, torch.nn.Module):
        raise UsageError(
            f"a {type(module).__name__} is no torch side", "give a torch.nn.Module or a checkpoint"
        )
    tensors = state(module)
    return MatchSide(
        type(module).__name__,
        {n: info_of(n, t) for n, t in tensors.items()},
        lambda n: bits_of(tensors[n]),
        ties=ties_of(tensors),
        buffers=frozenset(n for n, _ in module.named_buffers(remove_duplicate=False)),
    )


def _flax(module: Any) -> MatchSide:
    taken = as_flax(module, None)
    if taken is None:
        raise UsageError(
            f"a {type(module).__name__} is no Flax side",
            "give an nnx.Module, (linen.Module, variables), (function, params) or a checkpoint",
        )
    side = flax_module(taken)
    return MatchSide(
        type(module[0] if isinstance(module, tuple) else module).__name__,
        {n: info_of(n, v) for n, v in side.values.items()},
        lambda n: np.asarray(side.values[n], order="C"),
        frozenset(side.statistics),
    )
