"""`convert.convert` and `convert.verify`, for the command line and for whoever writes Python."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.certificate import Certificate
from convert.commit import check_target
from convert.proof.report import LEVELS, Level, Report
from convert.run import Progress, disk_needed, memory_needed, run
from convert.targets import Target, by_suffix, choose
from zoo import hub
from zoo.apply import apply
from zoo.containers import open_checkpoint
from zoo.containers.base import Reader
from zoo.containers.errors import NotEquivalent, UsageError
from zoo.identification import FLAX_TREES
from zoo.label import read_label
from zoo.layout import TREES, Tree
from zoo.loading import dtype_code, make_request
from zoo.plan import Plan, make_plan

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Prepared:
    """A conversion that has been planned and not yet begun."""

    plan: Plan
    target: Target
    notices: list[str]
    container: str  # the source's

    @property
    def memory(self) -> int:
        """Bytes of tensors that will be held at the peak."""
        return memory_needed(self.plan)

    @property
    def disk(self) -> int:
        """Bytes that will be needed on the target's disk at the peak."""
        return disk_needed(self.plan, self.target)


@dataclass(frozen=True)
class _Order:
    """The arguments of `convert`, as they were given."""

    src: Source
    dst: Source | None
    to: str | None
    framework: str | None
    tree: Tree
    model: str | None
    config: Source | Mapping[str, Any] | None
    dtype: str | None
    max_shard_size: int | None

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

    def prepare(self, reader: Reader) -> Prepared:
        """Identify, plan, and choose the target."""
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
            request=make_request(self.model, self.config),
            sources=sources,
            dtype=None if self.dtype is None else dtype_code(self.dtype),
        )
        target, told = self.target("torch" if made.target_tree == "torch" else "flax")
        return Prepared(made, target, [*made.notices, *told], reader.container)

    def target(self, framework: str) -> tuple[Target, list[str]]:
        """Where the result goes, and what to tell about it."""
        dst = None if self.dst is None else Path(self.dst)
        return choose(hub.locate(self.src), dst, self.to, framework, self.max_shard_size)


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
    "nnx", "linen" or "linen-compact". `dtype` casts floating-point tensors. `verify` re-reads the
    result and maps it back, `level="outputs"` also runs both twins. `on_plan` is called once
    everything is known and nothing is written.

    Raises ZooError; see `zoo.containers.errors` for its kinds.
    """
    if level not in LEVELS:
        raise UsageError(f"there is no level {level!r}", f"known are {', '.join(LEVELS)}")
    order = _Order(src, dst, to, framework, tree, model, config, dtype, max_shard_size)
    with order.open() as reader:
        prepared = order.prepare(reader)
        check_target(prepared.target.path, reader.path, force)
        on_plan(prepared)
        prove = _outputs_prover(order) if verify and level == "outputs" else None
        return run(
            reader,
            prepared.plan,
            prepared.target,
            force=force,
            verify=verify,
            prove=prove,
            progress=progress,
        )


def plan(
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
) -> Prepared:
    """What `convert` of the same arguments would do. Reads names and shapes, writes nothing."""
    order = _Order(src, dst, to, framework, tree, model, config, dtype, max_shard_size)
    with order.open() as reader:
        return order.prepare(reader)


def verify(
    a: Source,
    b: Source,
    level: Level = "bits",
    *,
    model: str | None = None,
    config: Source | Mapping[str, Any] | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Whether two checkpoints, of any containers and frameworks, are the same model.

    "bits": every tensor, mapped to the canonical layout, bit for bit. "outputs": besides, both are
    run, each in its framework, and every output and intermediate is judged by the rounding noise.
    Raises ZooError where they cannot be compared; a difference is no error but the verdict.
    """
    if level not in LEVELS:
        raise UsageError(f"there is no level {level!r}", f"known are {', '.join(LEVELS)}")
    from convert.proof.bits import compare_bits

    request = make_request(model, config)
    report = Report(os.fspath(a), os.fspath(b), level)
    with ExitStack() as stack:
        sides: list[tuple[Reader, Plan]] = []
        for source, prefer in ((a, "torch"), (b, "flax")):
            reader = stack.enter_context(open_checkpoint(hub.locate(source), prefer))
            sides.append((reader, make_plan(reader, read_label(reader), "torch", request=request)))
        first, second = sides
        if first[1].model is not second[1].model:
            names = first[1].model.name, second[1].model.name
            raise UsageError(f"{a} is {names[0]}, {b} is {names[1]}", "compare two of one model")
        report.notices = list(dict.fromkeys(n for _, p in sides for n in p.notices))
        compare_bits(first, second, report, progress)
        if level == "outputs":
            report.outputs = _outputs(first, second)
    return report


def _outputs(a: tuple[Reader, Plan], b: tuple[Reader, Plan]) -> list[Any]:
    from convert.proof.outputs import compare_outputs

    known = next((p for _, p in (a, b) if not p.unknown), None)
    if known is None:
        missing = ", ".join(sorted(a[1].unknown & b[1].unknown))
        raise UsageError(
            f"running the model needs {missing}, which the tensors do not tell",
            "name a preset with --model, or give its config.json with --config",
        )
    sides = [("torch" if p.source_tree == "torch" else "flax", _canonical(r, p)) for r, p in (a, b)]
    return compare_outputs(known.model, known.config, sides[0], sides[1])


def _outputs_prover(order: _Order) -> Callable[[Path], dict[str, object]]:
    def prove(written: Path) -> dict[str, object]:
        report = verify(order.src, written, "outputs", model=order.model, config=order.config)
        worst = report.worst
        if report.verdict == "different":
            where = worst.name if worst else report.differences[0].name
            raise NotEquivalent(
                f"the result computes something else, first in {where}",
                "nothing was kept; the model's twins differ, please report it",
            )
        assert worst is not None
        return {
            "level": "outputs",
            "outputs": len(report.outputs),
            "worst": {"name": worst.name, "error": worst.error, "noise": worst.noise},
        }

    return prove


def _canonical(reader: Reader, p: Plan) -> dict[str, np.ndarray]:
    values: dict[str, np.ndarray] = {}
    for step in p.steps:
        made = apply(step.ops, [reader.read(name) for name in step.sources])
        values |= dict(zip(step.targets, made, strict=True))
    return values
