"""Two checkpoints of the zoo's models, compared as far as a level asks for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from convert.compare.levels import weights_differ
from convert.compare.report import Report
from convert.compare.runnable import runnable
from convert.compare.settings import Level, Settings
from convert.compare.weights import compare_bits
from convert.judge.bits import TensorDifference
from convert.matching.pair import Pair
from convert.training_state.besides import besides
from convert.training_state.comparison import compare_training
from zoo import hub
from zoo.checkpoint.certificate import Certificate
from zoo.checkpoint.generation import check_weights
from zoo.checkpoint.label import Label, read_label
from zoo.checkpoint.peel import any_below
from zoo.checkpoint.plan import Plan, make_plan, read_step
from zoo.checkpoint.progress import Progress
from zoo.checkpoint.readings import title
from zoo.checkpoint.request import Request
from zoo.containers import filenames, open_checkpoint
from zoo.containers.base import Reader
from zoo.containers.committed import beside
from zoo.containers.errors import UsageError, ZooError
from zoo.model import Config, Model

Source = str | os.PathLike[str]
Opened = tuple[Reader, Plan]
_DIAGNOSED = 8  # tensors that differ
_CERTIFICATE_MAX = 64 << 20  # bytes


def verify_checkpoints(
    a: Source,
    b: Source,
    level: Level,
    request: Request,
    inputs: Any,
    options: Settings,
    progress: Progress,
) -> Report:
    """The report for the checkpoints at `a` and `b`, whatever `zoo.hub` understands."""
    report = Report(os.fspath(a), os.fspath(b), level)
    with ExitStack() as stack:
        sides: list[tuple[Reader, Plan]] = []
        states = []
        readers = [
            stack.enter_context(open_checkpoint(hub.locate(source), prefer))
            for source, prefer in ((a, "torch"), (b, "flax"))
        ]
        labels = [read_label(reader) for reader in readers]
        shared = Request(layout=next((x.layout for x in labels if x.layout is not None), None))
        for reader, label in zip(readers, labels, strict=True):
            asked = replace(request, prefix=_prefix(request.prefix, reader, readers))
            made = _planned(reader, label, asked, shared)
            made, state = besides(reader, made, stack)
            sides.append((reader, made))
            states.append(state)
        first, second = sides
        if first[1].model is not second[1].model:
            names = first[1].title, second[1].title
            raise UsageError(f"{a} is {names[0]}, {b} is {names[1]}", "compare two of one model")
        report.notices = list(dict.fromkeys(n for _, p in sides for n in p.notices))
        report.certificate = certificate_beside([reader.path for reader, _ in sides])
        found = compare_training(states[0], states[1], (report.a, report.b))
        report.differences += found.differences
        report.notices += found.notices
        compare_checkpoints(first, second, report, inputs, options, progress)
    return report


def _planned(reader: Reader, label: Label, request: Request, shared: Request) -> Plan:
    """One side. A layout that came with the other side is tried first where this one has none: the
    config.json in its directory may be of another checkpoint there."""
    if not request.silent or label.layout is not None or shared.silent:
        return make_plan(reader, label, "torch", request=request)
    try:
        return make_plan(reader, label, "torch", request=replace(shared, prefix=request.prefix))
    except ZooError:
        if label.model is None:
            raise
        return make_plan(reader, label, "torch", request=request)


def _prefix(prefix: str | None, reader: Reader, readers: Iterable[Reader]) -> str | None:
    """The prefix for one side: the other may hold that model alone."""
    elsewhere = prefix is not None and any(any_below(r.tensors, prefix) for r in readers)
    here = prefix is not None and any_below(reader.tensors, prefix)
    return prefix if here or not elsewhere else None


def compare_checkpoints(
    a: Opened,
    b: Opened,
    report: Report,
    inputs: Any,
    options: Settings,
    progress: Progress = lambda stage, done, total: None,
) -> None:
    """Fill `report`. Both plans lead to the torch tree."""
    known = next((p for _, p in (a, b) if not p.unknown), None)
    titled = known or a[1]
    report.model = title(titled.model, titled.config, titled.unknown)
    report.config = titled.fields | dict.fromkeys(sorted(a[1].unknown & b[1].unknown))
    family = None if report.level == "bits" else runnable(a[1], b[1])
    compare_bits(a, b, report, progress)
    _diagnose(report, a, b)
    configs = _contradictions(a[1], b[1])
    if report.level == "bits":
        report.notices += [f"the configs differ: {what}" for what in configs]
        report.first_divergence = weights_differ(report)
        return
    report.differences += [TensorDifference("config", what) for what in configs]
    assert family is not None
    sides = [
        Weights(
            plan.source_side,
            titled.config if plan.unknown else plan.config,
            _canonical(reader, plan),
        )
        for reader, plan in (a, b)
    ]
    run_twins(family, sides[0], sides[1], report, inputs, options)
    for (reader, _), side in zip((a, b), sides, strict=True):
        if reader.container == "onnx":
            from convert.compare.onnx_side import compare_onnx

            given = _inputs(family, side.config, inputs)
            made = compare_onnx(reader.path, family, side.config, side.canonical, given)
            report.outputs += made


def _diagnose(report: Report, a: Opened, b: Opened) -> None:
    """Say of the first tensors that differ what would make them fit."""
    from convert.diagnose.hypotheses_tensors import explained

    differing = [d for d in report.differences if d.count][:_DIAGNOSED]
    if not differing:
        return
    ours, theirs = _Tensors(a), _Tensors(b)
    right = ours.kinds.keys() - {d.name for d in report.differences}
    for d in differing:
        if d.name in ours and d.name in theirs:
            others = _OfShape(ours, d.name)
            kind = ours.kinds[d.name]
            made = explained(d, d.name, ours[d.name], theirs[d.name], others, kind, right)
            report.differences[report.differences.index(d)] = made


class _Tensors(Mapping[str, np.ndarray]):
    """The tensors of one side by canonical name (without a head's prefix), read when asked for."""

    def __init__(self, opened: Opened) -> None:
        self._reader, plan = opened
        prefix = plan.prefix
        self._steps = {n.removeprefix(prefix): s for s in plan.steps for n in s.names}
        self._names = {n.removeprefix(prefix): n for s in plan.steps for n in s.names}
        self.shapes = {
            n.removeprefix(prefix): i.shape
            for s in plan.steps
            for n, i in zip(s.names, s.target_infos, strict=True)
        }
        self.kinds = {name: step.kind for name, step in self._steps.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        step = self._steps[name]
        return read_step(self._reader, step)[step.names.index(self._names[name])]

    def __iter__(self) -> Iterator[str]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)


class _OfShape(Mapping[str, np.ndarray]):
    """The other tensors of one shape."""

    def __init__(self, tensors: _Tensors, name: str) -> None:
        shape = tensors.shapes[name]
        self._tensors = tensors
        self._names = [n for n, s in tensors.shapes.items() if s == shape and n != name]

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Weights:
    """What one twin is made of."""

    framework: str
    config: Config
    canonical: Mapping[str, np.ndarray]


def run_twins(
    model: Model, a: Weights, b: Weights, report: Report, inputs: Any, options: Settings
) -> None:
    """Run the twins of `a` and of `b` and fill `report` as far as its level asks for."""
    from convert.compare.levels import compare_sides
    from convert.compare.sides import Side
    from convert.compare.torch_side import TorchSide
    from convert.compare.twins import twin, twin_pair
    from convert.runtime.precision import full_precision

    given = _inputs(model, a.config, inputs)

    def side(framework: str, of: Weights) -> Side:
        made = framework, of.canonical
        return twin(model, of.config, *made, inputs=given, seed=options.seed)

    def pair() -> Pair:
        return twin_pair(model, (a.config, a.canonical), (b.config, b.canonical), given)

    with full_precision():
        of_a, of_b = side(a.framework, a), side(b.framework, b)
        reference = next((s for s in (of_a, of_b) if isinstance(s, TorchSide)), None)
        reference = reference or side("torch", a)  # type: ignore[assignment]
        assert reference is not None
        compare_sides(reference, of_a, of_b, report, options, pair)


def _canonical(reader: Reader, plan: Plan) -> dict[str, np.ndarray]:
    values: dict[str, np.ndarray] = {}
    for step in plan.steps:
        values |= dict(zip(step.targets, read_step(reader, step), strict=True))
    return values


def _inputs(model: Model, config: Config, given: Any) -> dict[str, np.ndarray]:
    """The model's sample inputs, or the user's own; UsageError where those do not fit."""
    sample = model.inputs(config)
    if given is None:
        return sample
    from convert.runtime.inputs import as_call

    call = as_call(given)
    named = dict(zip(sample, call.args, strict=False)) | dict(call.kwargs)
    wrong = [name for name in named if name not in sample]
    if wrong or len(call.args) > len(sample):
        raise UsageError(
            f"{model.name} has no input {', '.join(wrong) or len(sample) + 1}",
            f"it takes {', '.join(sample)}",
        )
    ranks = [
        f"{name} has shape {np.shape(x)}, and {sample[name].ndim} axes are wanted"
        for name, x in named.items()
        if np.ndim(x) != sample[name].ndim
    ]
    if ranks:
        shapes = ", ".join(f"{n} as {tuple(x.shape)}" for n, x in sample.items())
        raise UsageError("the inputs do not fit", f"samples are: {shapes}", ranks)
    return named


def _contradictions(a: Plan, b: Plan) -> list[str]:
    """Fields that both sides state, and state differently."""
    if a.config is None or b.config is None:
        return []
    fields = [f.name for f in dataclasses.fields(a.config) if f.name not in a.unknown | b.unknown]
    pairs = [(f, getattr(a.config, f), getattr(b.config, f)) for f in fields]
    return [f"{f} {x!r} and {y!r}" for f, x, y in pairs if x != y]


def certificate_beside(paths: list[Path]) -> dict[str, Any] | None:
    """The first certificate that lies beside one of these checkpoints and is one of ours."""
    for path in paths:
        file = beside(path, filenames.CERTIFICATE)
        try:
            if file.stat().st_size > _CERTIFICATE_MAX:
                continue
            found = Certificate.read(file)
            check_weights(found.weights, file, path)
            return dataclasses.asdict(found)
        except (OSError, ValueError, ZooError):
            continue
    return None
