"""A conversion before it begins: what was asked for, what the source is, where the result goes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.compare.runnable import runnable
from convert.compare.settings import Level, check_level
from convert.engine.commit import check_paths, check_replaceable, check_space
from convert.engine.targets import Target, by_suffix, choose
from convert.engine.workplace import reclaimable
from convert.training_state import storage
from convert.training_state.besides import besides
from convert.training_state.state import TrainingState
from zoo import hub
from zoo.checkpoint.label import Label, read_label
from zoo.checkpoint.plan import Plan, make_plan
from zoo.checkpoint.request import make_request
from zoo.checkpoint.slabs import MEMORY, cut, default_workers, held
from zoo.containers import open_checkpoint
from zoo.containers.base import Reader
from zoo.containers.dtypes import dtype_code
from zoo.containers.errors import UsageError
from zoo.layout import FLAX_TREES, STACKED, TREES, Tree
from zoo.loading import FRAMEWORKS
from zoo.registry import side_of

Source = str | os.PathLike[str]
_LEAST = 8_000_000  # bytes of memory with which a conversion gets on
_MOST_WORKERS = 64


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
    max_memory: int = MEMORY  # bytes of tensors that are held at a time, where the ops allow it
    workers: int = field(default_factory=default_workers)

    @property
    def container(self) -> str:
        """The source's."""
        return self.reader.container

    @property
    def memory(self) -> int:
        """Bytes of tensors that will be held at the peak; above level "bits" at least these."""
        return memory_needed(self.plan, self.level, self.max_memory, self.workers)

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
    dialect: str | None = None
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
    max_memory: int | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        check_level(self.level)
        if self.max_memory is not None and self.max_memory < _LEAST:
            raise UsageError(
                f"{self.max_memory} bytes are too little memory", f"give {_LEAST} at least: 8MB"
            )
        if self.workers is not None and not 1 <= self.workers <= _MOST_WORKERS:
            raise UsageError(
                f"{self.workers} workers cannot be had", f"give a number from 1 to {_MOST_WORKERS}"
            )
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

        if self.dialect is not None and self.tree != "nnx":
            raise UsageError(
                f"dialect {self.dialect!r} and tree {self.tree!r} both name the result's tensors",
                "leave out one of the two",
            )
        if self.dialect is not None and self.framework not in (None, side_of(self.dialect)):
            raise UsageError(
                f"the dialect {self.dialect!r} is one of {side_of(self.dialect)}'s",
                "give one of the framework's that is wanted; "
                "`zooconvert models --dialects` lists them",
            )

    @property
    def wanted(self) -> str | None:
        """The framework that was asked for, if one was: safetensors is of both."""
        if self.framework is not None:
            return self.framework
        if self.dialect is not None:
            return side_of(self.dialect)
        to = self.to or by_suffix(None if self.dst is None else Path(self.dst))
        told = {"orbax": "flax", "msgpack": "flax", "pt": "torch"}.get(to or "")
        return told or (None if self.tree == "nnx" else "flax")


def prepare(order: Order, stack: ExitStack) -> Prepared:
    """Open, identify, plan, choose the target, and see that it may be written. What is opened is
    closed by `stack`. Reads names and shapes, writes nothing."""
    wanted = order.wanted
    # Where the framework is known, an impossible target is refused before the source is looked at.
    chosen = None if wanted is None else _target(order, wanted)
    prefer = "flax" if wanted == "torch" else "torch"  # safetensors of both in one directory
    reader = stack.enter_context(open_checkpoint(hub.locate(order.src), prefer))
    label = read_label(reader)
    plan = make_plan(
        reader,
        label,
        None if wanted is None else _tree(order, wanted, label),
        request=make_request(order.model, order.config, order.layout, order.prefix),
        sources=_sources(order, wanted, reader.container),
        dtype=None if order.dtype is None else dtype_code(order.dtype),
    )
    if reader.container != _GRAPHS:
        _refuse_same(plan)
    target = chosen or _target(order, plan.target_side)
    told: list[str] = []
    if order.level != "bits":
        runnable(plan)
    check_paths(target.path, reader.path)
    check_replaceable(target.path, order.force)
    plan, training = besides(reader, plan, stack, order.learning_rate)
    if order.dtype is not None and (training.optimizers or training.ema):
        told = [*told, "moments and averages keep their dtypes"]
    if plan.unknown and plan.model and plan.model.to_hf and plan.readable and target.has_config:
        untold = ", ".join(sorted(plan.unknown))
        told = [*told, f"the config.json is not one of transformers', which would guess {untold}"]
    if target.has_config and plan.readable and _is_unknown_upstream(plan):
        told = [*told, "transformers has no such model: its keys are not in the config.json"]
    needed = disk_needed(plan, target, training) - reclaimable(target.path)
    check_space(target.path.parent, needed)
    notices = [*plan.notices, *told]
    return Prepared(
        *(reader, plan, target, training, order.level, order.verify, order.force, notices),
        MEMORY if order.max_memory is None else order.max_memory,
        default_workers() if order.workers is None else order.workers,
    )


def _is_unknown_upstream(plan: Plan) -> bool:
    """Whether the family is transformers' too, and this config of it is not."""
    return bool(plan.model and plan.model.to_hf and not plan.model.to_hf(plan.config))


def _tree(order: Order, wanted: str, label: Label) -> Tree:
    """How the result is spelled: as asked for, else as torch spelled it before, else as we do."""
    if order.dialect is not None:
        return order.dialect
    return order.tree if wanted == "flax" else label.dialect or "torch"


def _sources(order: Order, wanted: str | None, container: str) -> tuple[Tree, ...]:
    """The trees that the source may be: with a dialect alone, of the same framework too. A graph
    has torch's names and is no file of torch's: it is converted either way."""
    if wanted is None or (order.dialect is not None and order.framework is None):
        return TREES
    return FLAX_TREES if wanted == "torch" and container != _GRAPHS else ("torch",)


_GRAPHS = "onnx"  # the container


def _refuse_same(plan: Plan) -> None:
    """UsageError where the result would be spelled as the source is, or no layer can be stacked."""
    if plan.source_tree == plan.target_tree:
        raise UsageError(
            f"its names are those of {plan.target_tree} already", "copy it, or name another dialect"
        )
    if plan.target_tree in STACKED and not plan.layout.stacks:
        raise UsageError(
            f"{plan.title} has no equal layers in a row that {plan.target_tree} could stack",
            f"give --tree {plan.target_tree.removesuffix('-scan')}",
        )


def _target(order: Order, framework: str) -> Target:
    """Where the result goes."""
    dst = None if order.dst is None else Path(order.dst)
    return choose(hub.beside(order.src), dst, order.to, framework, order.max_shard_size)


def disk_needed(plan: Plan, target: Target, training: TrainingState) -> int:
    """Bytes that the conversion needs on the target's disk at its peak."""
    size = sum(info.nbytes for info in plan.target_tensors().values())
    spool = 2 if target.to == "pt" else 1  # torch saves from a spool file of the same size
    moments = sum(info.nbytes for info in storage.header(training).values())
    return size * spool + moments + (1 << 20)


def memory_needed(plan: Plan, level: Level, memory: int, workers: int) -> int:
    """Bytes of tensors held at the peak. Above level "bits" a lower bound: all weights in float32
    as they were read and in either twin, and a copy of one twin on its way to float64, without what
    the twins compute."""
    streamed = held(cut(plan.steps, memory, workers), workers)
    if level == "bits":
        return streamed
    values = sum(i.size for s in plan.steps for i in s.target_infos)
    return max(streamed, values * (4 + 4 + 4 + 4 + 8))
