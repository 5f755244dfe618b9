"""A conversion before it begins: what was asked for, what the source is, where the result goes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.compare.checkpoints import runnable
from convert.compare.settings import Level, check_level
from convert.engine.ahead import WORKERS
from convert.engine.commit import check_paths, check_replaceable, check_space
from convert.engine.targets import Target, by_suffix, choose
from convert.training_state import storage
from convert.training_state.besides import besides
from convert.training_state.state import TrainingState
from zoo import hub
from zoo.checkpoint.identification import FLAX_TREES
from zoo.checkpoint.label import read_label
from zoo.checkpoint.plan import Plan, make_plan
from zoo.checkpoint.request import make_request
from zoo.containers import open_checkpoint
from zoo.containers.base import Reader
from zoo.containers.dtypes import dtype_code
from zoo.containers.errors import UsageError
from zoo.layout import TREES, Tree
from zoo.loading import FRAMEWORKS

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Prepared:
    """A conversion that has been planned and not yet begun."""

    reader: Reader
    plan: Plan
    target: Target
    training: TrainingState  # what the source holds besides weights
    level: Level
    verify: bool
    force: bool
    notices: list[str]

    @property
    def container(self) -> str:
        """The source's."""
        return self.reader.container

    @property
    def memory(self) -> int:
        """Bytes of tensors that will be held at the peak; above level "bits" at least these."""
        return memory_needed(self.plan, self.level)

    @property
    def disk(self) -> int:
        """Bytes that will be needed on the target's disk at the peak."""
        return disk_needed(self.plan, self.target, self.training)


@dataclass(frozen=True)
class Order:
    """The arguments of `convert.convert`, as they were given."""

    src: Source
    dst: Source | None = None
    to: str | None = None
    framework: str | None = None
    tree: Tree = "nnx"
    model: str | None = None
    config: Source | Mapping[str, Any] | None = None
    dtype: str | None = None
    max_shard_size: int | None = None
    learning_rate: float | None = None
    layout: Any = None
    prefix: str | None = None
    force: bool = False
    verify: bool = True
    level: Level = "bits"

    def __post_init__(self) -> None:
        check_level(self.level)
        if self.level != "bits" and (self.dtype is not None or not self.verify):
            what = "a cast changes" if self.dtype is not None else "verify=False leaves out"
            raise UsageError(
                f"level {self.level!r} compares with the source, which {what}",
                "leave out one of the two",
            )
        if self.framework not in (None, *FRAMEWORKS):
            raise UsageError(f"there is no framework {self.framework!r}", "it is 'torch' or 'flax'")
        if self.tree not in FLAX_TREES:
            raise UsageError(
                f"there is no tree {self.tree!r}", f"known are {', '.join(FLAX_TREES)}"
            )

    @property
    def wanted(self) -> str | None:
        """The framework that was asked for, if one was: safetensors is of both."""
        if self.framework is not None:
            return self.framework
        to = self.to or by_suffix(None if self.dst is None else Path(self.dst))
        return {"orbax": "flax", "msgpack": "flax", "pt": "torch"}.get(to or "")


def prepare(order: Order, stack: ExitStack) -> Prepared:
    """Open, identify, plan, choose the target, and see that it may be written. What is opened is
    closed by `stack`. Reads names and shapes, writes nothing."""
    wanted = order.wanted
    # Where the framework is known, an impossible target is refused before the source is looked at.
    chosen = None if wanted is None else _target(order, wanted)
    prefer = "flax" if wanted == "torch" else "torch"  # safetensors of both in one directory
    reader = stack.enter_context(open_checkpoint(hub.locate(order.src), prefer))
    plan = make_plan(
        reader,
        read_label(reader),
        None if wanted is None else "torch" if wanted == "torch" else order.tree,
        request=make_request(order.model, order.config, order.layout, order.prefix),
        sources=TREES if wanted is None else FLAX_TREES if wanted == "torch" else ("torch",),
        dtype=None if order.dtype is None else dtype_code(order.dtype),
    )
    target, told = chosen or _target(order, "torch" if plan.target_tree == "torch" else "flax")
    if order.level != "bits":
        runnable(plan)
    check_paths(target.path, reader.path)
    check_replaceable(target.path, order.force)
    plan, training = besides(reader, plan, stack, order.learning_rate)
    if order.dtype is not None and (training.optimizers or training.ema):
        told = [*told, "moments and averages keep their dtypes"]
    if plan.unknown and plan.model and plan.model.to_hf and target.has_config:
        untold = ", ".join(sorted(plan.unknown))
        told = [*told, f"the config.json is not one of transformers', which would guess {untold}"]
    check_space(target.path.parent, disk_needed(plan, target, training))
    notices = [*plan.notices, *told]
    return Prepared(reader, plan, target, training, order.level, order.verify, order.force, notices)


def _target(order: Order, framework: str) -> tuple[Target, list[str]]:
    """Where the result goes, and what to tell about it."""
    dst = None if order.dst is None else Path(order.dst)
    return choose(hub.beside(order.src), dst, order.to, framework, order.max_shard_size)


def disk_needed(plan: Plan, target: Target, training: TrainingState) -> int:
    """Bytes that the conversion needs on the target's disk at its peak."""
    size = sum(info.nbytes for info in plan.target_tensors().values())
    spool = 2 if target.to == "pt" else 1  # torch saves from a spool file of the same size
    moments = sum(info.nbytes for info in storage.header(training).values())
    return size * spool + moments + (1 << 20)


def memory_needed(plan: Plan, level: Level = "bits") -> int:
    """Bytes of tensors held at the peak: one step being written, and the next ones under way. Above
    level "bits" a lower bound: all weights in float32 as they were read and in either twin, and a
    copy of one twin on its way to float64, without what the twins compute."""
    sizes = [s.nbytes + sum(i.nbytes for i in s.target_infos) for s in plan.steps]
    at_once = 1 + WORKERS
    streamed = max((sum(sizes[i : i + at_once]) for i in range(len(sizes))), default=0)
    if level == "bits":
        return streamed
    values = sum(i.size for s in plan.steps for i in s.target_infos)
    return max(streamed, values * (4 + 4 + 4 + 4 + 8))
