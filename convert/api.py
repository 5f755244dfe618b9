"""`convert.convert`, for the command line and for whoever writes Python."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.compare.settings import Level, check_level
from convert.engine.commit import check_space, check_target
from convert.engine.execute import disk_needed, memory_needed, run
from convert.engine.targets import Target, by_suffix, choose
from convert.training_state.besides import besides
from convert.training_state.state import TrainingState
from convert.verification import prover
from zoo import hub
from zoo.checkpoint.certificate import Certificate
from zoo.checkpoint.identification import FLAX_TREES
from zoo.checkpoint.label import read_label
from zoo.checkpoint.plan import Plan, make_plan
from zoo.checkpoint.progress import Progress
from zoo.checkpoint.request import make_request
from zoo.containers import open_checkpoint
from zoo.containers.base import Reader
from zoo.containers.dtypes import dtype_code
from zoo.containers.errors import UsageError
from zoo.layout import TREES, Layout, Tree
from zoo.loading import FRAMEWORKS

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Prepared:
    """A conversion that has been planned and not yet begun."""

    plan: Plan
    target: Target
    notices: list[str]
    container: str  # the source's
    training: TrainingState  # what the source holds besides weights

    @property
    def memory(self) -> int:
        """Bytes of tensors that will be held at the peak."""
        return memory_needed(self.plan)

    @property
    def disk(self) -> int:
        """Bytes that will be needed on the target's disk at the peak."""
        return disk_needed(self.plan, self.target, self.training)


@dataclass(frozen=True)
class _Order:
    """The arguments of `convert`, as they were given."""

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
    layout: Layout | None = None

    def open(self) -> Reader:
        """The source, of the framework that the target is not of."""
        prefer = "flax" if self.wanted == "torch" else "torch"
        return open_checkpoint(hub.locate(self.src), prefer)

    @property
    def wanted(self) -> str | None:
        """The framework that was asked for, if one was: safetensors is of both."""
        if self.framework is not None:
            return self.framework
        to = self.to or by_suffix(None if self.dst is None else Path(self.dst))
        return {"orbax": "flax", "msgpack": "flax", "pt": "torch"}.get(to or "")

    def prepare(self, reader: Reader, force: bool, stack: ExitStack) -> Prepared:
        """Identify, plan, choose the target, and see that it may be written. Files that belong to
        the source are opened into `stack`."""
        if self.framework not in (None, *FRAMEWORKS):
            raise UsageError(f"there is no framework {self.framework!r}", "it is 'torch' or 'flax'")
        if self.tree not in FLAX_TREES:
            raise UsageError(
                f"there is no tree {self.tree!r}", f"known are {', '.join(FLAX_TREES)}"
            )
        target_tree: Tree | None = None
        sources: tuple[Tree, ...] = TREES
        if self.wanted is not None:
            target_tree = "torch" if self.wanted == "torch" else self.tree
            sources = FLAX_TREES if self.wanted == "torch" else ("torch",)
            self.target(self.wanted)  # what cannot be asked for is told before the tensors are
        made = make_plan(
            reader,
            read_label(reader),
            target_tree,
            request=make_request(self.model, self.config, self.layout),
            sources=sources,
            dtype=None if self.dtype is None else dtype_code(self.dtype),
        )
        target, told = self.target("torch" if made.target_tree == "torch" else "flax")
        check_target(target.path, reader.path, force)
        made, training = besides(reader, made, stack, self.learning_rate)
        if self.dtype is not None and (training.optimizers or training.ema):
            told.append("moments and averages keep their dtypes")
        check_space(target.path.parent, disk_needed(made, target, training))
        return Prepared(made, target, [*made.notices, *told], reader.container, training)

    def target(self, framework: str) -> tuple[Target, list[str]]:
        """Where the result goes, and what to tell about it."""
        dst = None if self.dst is None else Path(self.dst)
        beside = hub.beside(self.src)
        return choose(beside, dst, self.to, framework, self.max_shard_size)


def convert(
    src: Source,
    dst: Source | None = None,
    to: str | None = None,
    *,
    framework: str | None = None,
    tree: Tree = "nnx",
    model: str | None = None,
    config: Source | Mapping[str, Any] | None = None,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    learning_rate: float | None = None,
    layout: Layout | None = None,
    force: bool = False,
    verify: bool = True,
    level: Level = "bits",
    progress: Progress = lambda stage, done, total: None,
    on_plan: Callable[[Prepared], None] = lambda prepared: None,
) -> Certificate:
    """Convert the checkpoint `src` to the other framework; `dst` appears whole, or not at all.

    `src` is whatever `zoo.hub` understands. `dst` None lies beside it: STEM.flax/ or
    STEM.safetensors. `to` is "orbax", "msgpack", "safetensors" or "pt" (None: by dst's suffix, else
    orbax or safetensors). `framework` is the target's, "flax" or "torch" (None: the one that `to`
    belongs to, else the one that the source is not of). `tree` is how a Flax checkpoint is nested:
    "nnx", "linen" or "linen-compact". `dtype` casts floating-point tensors. `learning_rate` is that
    of the last update, for a momentum that optax keeps times it. `layout` says what the tensors are
    where no family has them: it then travels with the result, so that the way back needs none.
    `verify` re-reads the
    result and maps it back; `level` is as in `convert.verify`: above "bits" both twins are run.
    `on_plan` is called once everything is known and nothing is written.

    Raises ZooError; see `zoo.containers.errors` for its kinds.
    """
    check_level(level)
    if level != "bits" and (dtype is not None or not verify):
        what = "a cast changes" if dtype is not None else "verify=False leaves out"
        raise UsageError(
            f"level {level!r} compares with the source, which {what}", "leave out one of the two"
        )
    order = _Order(
        *(src, dst, to, framework, tree, model, config, dtype, max_shard_size, learning_rate),
        layout=layout,
    )
    with ExitStack() as stack:
        reader = stack.enter_context(order.open())
        prepared = order.prepare(reader, force, stack)
        request = make_request(model, config, layout)
        on_plan(prepared)
        return run(
            reader,
            prepared.plan,
            prepared.target,
            training=prepared.training,
            force=force,
            verify=verify,
            prove=prover(reader, request, level) if level != "bits" else None,
            progress=progress,
        )


def plan(
    src: Source, dst: Source | None = None, to: str | None = None, force: bool = False, **kw: Any
) -> Prepared:
    """What `convert` of the same arguments would do, refusing what it would refuse.

    Reads names and shapes, writes nothing.
    """
    order = _Order(src, dst, to, **kw)
    with ExitStack() as stack:
        return order.prepare(stack.enter_context(order.open()), force, stack)
