"""`convert.convert` and `convert.verify`, for the command line and for whoever writes Python."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.certificate import Certificate
from convert.commit import check_space, check_target
from convert.proof.report import LEVELS, Level, Report, Row, TensorDifference
from convert.run import Progress, disk_needed, memory_needed, run
from convert.targets import Target, by_suffix, choose
from zoo import hub
from zoo.containers import open_checkpoint
from zoo.containers.base import Reader
from zoo.containers.errors import NotEquivalent, UsageError
from zoo.identification import FLAX_TREES
from zoo.label import read_label
from zoo.layout import TREES, Tree
from zoo.loading import FRAMEWORKS, dtype_code, make_request
from zoo.plan import Plan, make_plan, read_step

Source = str | os.PathLike[str]
Side = tuple[Reader, Plan]


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
    dst: Source | None = None
    to: str | None = None
    framework: str | None = None
    tree: Tree = "nnx"
    model: str | None = None
    config: Source | Mapping[str, Any] | None = None
    dtype: str | None = None
    max_shard_size: int | None = None

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

    def prepare(self, reader: Reader, force: bool) -> Prepared:
        """Identify, plan, choose the target, and see that it may be written."""
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
            request=make_request(self.model, self.config),
            sources=sources,
            dtype=None if self.dtype is None else dtype_code(self.dtype),
        )
        target, told = self.target("torch" if made.target_tree == "torch" else "flax")
        check_target(target.path, reader.path, force)
        check_space(target.path.parent, disk_needed(made, target))
        return Prepared(made, target, [*made.notices, *told], reader.container)

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
    check_level(level)
    if level == "outputs" and (dtype is not None or not verify):
        what = "a cast changes" if dtype is not None else "verify=False leaves out"
        raise UsageError(
            f"level 'outputs' compares with the source, which {what}", "leave out one of the two"
        )
    order = _Order(src, dst, to, framework, tree, model, config, dtype, max_shard_size)
    with order.open() as reader:
        prepared = order.prepare(reader, force)
        on_plan(prepared)
        return run(
            reader,
            prepared.plan,
            prepared.target,
            force=force,
            verify=verify,
            prove=_outputs_prover(reader, order) if level == "outputs" else None,
            progress=progress,
        )


def plan(
    src: Source, dst: Source | None = None, to: str | None = None, force: bool = False, **kw: Any
) -> Prepared:
    """What `convert` of the same arguments would do, refusing what it would refuse.

    Reads names and shapes, writes nothing.
    """
    order = _Order(src, dst, to, **kw)
    with order.open() as reader:
        return order.prepare(reader, force)


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
    check_level(level)
    for source in (a, b):
        if not isinstance(source, str | os.PathLike):
            raise UsageError(
                f"{type(source).__name__} is no checkpoint", "give paths or names of checkpoints"
            )
    request = make_request(model, config)
    report = Report(os.fspath(a), os.fspath(b), level)
    with ExitStack() as stack:
        sides: list[Side] = []
        for source, prefer in ((a, "torch"), (b, "flax")):
            reader = stack.enter_context(open_checkpoint(hub.locate(source), prefer))
            sides.append((reader, make_plan(reader, read_label(reader), "torch", request=request)))
        first, second = sides
        if first[1].model is not second[1].model:
            names = first[1].model.name, second[1].model.name
            raise UsageError(f"{a} is {names[0]}, {b} is {names[1]}", "compare two of one model")
        report.notices = list(dict.fromkeys(n for _, p in sides for n in p.notices))
        _compare(first, second, report, progress)
    return report


def check_level(level: str) -> None:
    """UsageError for a level that there is not."""
    if level not in LEVELS:
        raise UsageError(f"there is no level {level!r}", f"known are {', '.join(LEVELS)}")


def _compare(a: Side, b: Side, report: Report, progress: Progress) -> None:
    from convert.proof.bits import compare_bits

    compare_bits(a, b, report, progress)
    configs = _contradictions(a[1], b[1])
    if report.level == "bits":
        report.notices += [f"the configs differ: {what}" for what in configs]
        return
    report.differences += [TensorDifference("config", what) for what in configs]
    report.outputs = _outputs(a, b)


def _contradictions(a: Plan, b: Plan) -> list[str]:
    """Fields that both sides state, and state differently."""
    fields = [f.name for f in dataclasses.fields(a.config) if f.name not in a.unknown | b.unknown]
    pairs = [(f, getattr(a.config, f), getattr(b.config, f)) for f in fields]
    return [f"{f} {x!r} and {y!r}" for f, x, y in pairs if x != y]


def _outputs(a: Side, b: Side) -> list[Row]:
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


def _outputs_prover(reader: Reader, order: _Order) -> Callable[[Path], dict[str, object]]:
    """Runs the source that is being converted, and the result that is not yet committed."""

    def prove(written: Path) -> dict[str, object]:
        request = make_request(order.model, order.config)
        report = Report(reader.path.name, written.name, "outputs")
        with open_checkpoint(written) as result:
            sides = [
                (r, make_plan(r, read_label(r), "torch", request=request)) for r in (reader, result)
            ]
            _compare(sides[0], sides[1], report, lambda stage, done, total: None)
        worst = report.worst
        if report.verdict == "different":
            bad = next((row.name for row in report.outputs if not row.same), None)
            raise NotEquivalent(
                f"the result computes something else, first in {bad or report.differences[0].name}",
                "nothing was kept; the model's twins differ, please report it",
            )
        assert worst is not None
        found = {"name": worst.name, "error": worst.error, "noise": worst.noise}
        return {
            "level": "outputs",
            "outputs": len(report.outputs),
            "worst": found | {"ratio": worst.ratio},
        }

    return prove


def _canonical(reader: Reader, p: Plan) -> dict[str, np.ndarray]:
    values: dict[str, np.ndarray] = {}
    for step in p.steps:
        values |= dict(zip(step.targets, read_step(reader, step), strict=True))
    return values
