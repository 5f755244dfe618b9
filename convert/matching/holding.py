"""One side of a match: the tensors of a checkpoint or of a module, read when they are wanted."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convert.runtime.arrays import to_numpy
from convert.runtime.flax_module import as_flax, flax_module
from convert.runtime.torch_module import state
from zoo import hub
from zoo.checkpoint.peel import NOT_WEIGHTS, is_weight
from zoo.containers import dtypes, open_checkpoint
from zoo.containers.base import TensorInfo
from zoo.containers.errors import UsageError

# Wrappers that no module of anybody's is called: whatever lies in them alone is the model.
_WRAPPERS = ("state_dict", "model_state_dict", "module", "_orig_mod", "params", "state")
_COLLECTIONS = ("params", "batch_stats")
_GENERATORS = frozenset(["rngs", "rng", "key", "count", "dropout_key"])


@dataclass
class MatchSide:
    """`tensors` are by the names that a layout has for them; those of `statistics` move with the
    batch. `module` is None for a checkpoint. `aside` is what the side holds besides weights."""

    title: str
    tensors: dict[str, TensorInfo]
    read: Callable[[str], np.ndarray]
    statistics: frozenset[str] = frozenset()
    ties: Mapping[str, str] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()  # of a torch module
    module: Any = None
    aside: tuple[str, ...] = ()


def hold(side: Any, framework: str, stack: ExitStack) -> MatchSide:
    """The side as tensors: a path to a checkpoint of any container, or a module.

    Raises UsageError for what is neither, ZooError for a checkpoint that cannot be read.
    """
    if isinstance(side, str | os.PathLike):
        return _checkpoint(side, framework, stack)
    return _torch(side) if framework == "torch" else _flax(side)


def _checkpoint(path: str | os.PathLike[str], framework: str, stack: ExitStack) -> MatchSide:
    reader = stack.enter_context(open_checkpoint(hub.locate(path)))
    names = {n: n for n in reader.tensors}
    aside = [n for n in names if not _weight(n, reader.tensors[n])]
    names = {n: n for n in names if n not in set(aside)}
    statistics: frozenset[str] = frozenset()
    heads = {n.partition(".")[0] for n in names}
    if framework == "flax" and heads and heads <= set(_COLLECTIONS):
        inner = {n.partition(".")[2]: s for n, s in names.items()}
        if len(inner) == len(names):
            statistics = frozenset(
                n.partition(".")[2] for n in names if n.startswith("batch_stats.")
            )
            names = inner
    while names and (head := _wrapper(names, bool(aside))):
        names = {n.removeprefix(f"{head}."): s for n, s in names.items()}
    if names and all(n.endswith(".value") for n in names):
        names = {n.removesuffix(".value"): s for n, s in names.items()}
    ties = {n: reader.ties[s] for n, s in names.items() if s in reader.ties}
    back = {s: n for n, s in names.items()}
    return MatchSide(
        str(path),
        {n: reader.tensors[s] for n, s in names.items()},
        lambda n: reader.read(names[n]),
        statistics,
        {n: back[t] for n, t in ties.items() if t in back},
        aside=tuple(aside),
    )


def _wrapper(names: Mapping[str, str], training: bool) -> str | None:
    heads = {n.partition(".")[0] for n in names}
    if len(heads) != 1 or any("." not in n for n in names):
        return None
    (head,) = heads
    return head if head in _WRAPPERS or (training and head in ("model", "net")) else None


def _weight(name: str, info: TensorInfo) -> bool:
    """Whether a tensor may be a weight: not an optimizer's, a generator's, a counter of steps."""
    parts = name.removesuffix(".value").split(".")
    if not is_weight(parts[0]) or (
        len(parts) > 1 and parts[0] == "state" and not is_weight(parts[1])
    ):
        return False
    if dtypes.is_float(info.dtype) or len(info.shape) > 1:
        return True
    return not ({*parts[-3:]} & _GENERATORS or parts[-1] in NOT_WEIGHTS)


def _torch(module: Any) -> MatchSide:
    import torch

    if not isinstance(module, torch.nn.Module):
        raise UsageError(
            f"a {type(module).__name__} is no torch side", "give a torch.nn.Module or a checkpoint"
        )
    tensors = state(module)
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    return MatchSide(
        type(module).__name__,
        {n: _info(to_numpy(t)) for n, t in tensors.items()},
        lambda n: np.asarray(to_numpy(tensors[n]), order="C"),
        ties={n: first[id(t)] for n, t in tensors.items() if first[id(t)] != n},
        buffers=frozenset(n for n, _ in module.named_buffers(remove_duplicate=False)),
        module=module,
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
        {n: _info(to_numpy(v)) for n, v in side.values.items()},
        lambda n: np.asarray(to_numpy(side.values[n]), order="C"),
        frozenset(side.statistics),
        module=taken,
    )


def _info(x: np.ndarray) -> TensorInfo:
    code = next((c for c, t in dtypes.NUMPY.items() if t == x.dtype), "F32")
    return TensorInfo(code, x.shape)
