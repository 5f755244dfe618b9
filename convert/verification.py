"""`convert.verify`: two checkpoints of the zoo, or anybody's torch module and Flax module."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from convert.compare.report import Report
from convert.compare.settings import OPTIMIZERS, STEPS, Level, Settings, check_level
from convert.training_state.besides import besides
from convert.training_state.comparison import compare_training
from zoo import hub
from zoo.checkpoint.certificate import now, versions
from zoo.checkpoint.label import read_label
from zoo.checkpoint.plan import Plan, make_plan
from zoo.checkpoint.progress import Progress
from zoo.checkpoint.request import UNSTATED, Request, make_request
from zoo.containers import open_checkpoint
from zoo.containers.base import Reader
from zoo.containers.errors import NotEquivalent, UsageError

Source = str | os.PathLike[str]


def verify(
    a: Any,
    b: Any,
    inputs: Any = None,
    level: Level | None = None,
    *,
    model: str | None = None,
    config: Source | Mapping[str, Any] | None = None,
    flax_inputs: Any = None,
    layers: Mapping[str, str] | None = None,
    layout: Any = None,
    variables: Mapping[str, Any] | None = None,
    optimizers: Sequence[str] = OPTIMIZERS,
    steps: int = STEPS,
    seed: int = 0,
    titles: tuple[str, str] | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Whether two models are the same: the verdict, and what it stands on.

    `a` and `b` are checkpoints of the zoo's models, of any containers and frameworks; or a
    torch.nn.Module and an nnx.Module, a bound linen.Module, or (linen.Module, variables).

    Levels, each with those before it:
    "bits": every tensor, mapped to torch's names and shapes, bit for bit (the default for
    checkpoints). "outputs": both are run in eval mode, in float32 and in float64; every output and
    intermediate is judged by the rounding noise (the default for modules). "gradients": of a scalar
    loss with respect to every parameter and floating-point input. "training": `steps` steps of each
    of `optimizers` on the one batch.

    `inputs` are NumPy, torch or JAX arrays: one, a tuple or list (positional) or a dict (by name;
    with torch's axes). Checkpoints have sample inputs of their own. For modules: `flax_inputs`
    where the Flax one takes others, else images are moved to channels-last where it asks for that;
    `layers` pairs that names do not tell, torch name -> Flax path; `layout` a zoo.layout.Layout, or
    its JSON, that says how the parameters lie; `variables` those of an unbound linen module.
    `model` and `config` say what checkpoints do not. `seed` is that of the loss's weights. `titles`
    name the two modules in the report.

    Neither model is changed. Raises ZooError where they cannot be compared; a difference is no
    error but the verdict.
    """
    options = Settings(tuple(dict.fromkeys(optimizers)), steps, seed)
    if isinstance(inputs, str):
        raise UsageError(f"inputs is the text {inputs!r}", f"write level={inputs!r}")
    if level is not None:
        check_level(level)
    started = time.perf_counter()
    if all(isinstance(side, str | os.PathLike) for side in (a, b)):
        if any(x is not None for x in (flax_inputs, layers, layout, variables)):
            raise UsageError(
                "flax_inputs, layers, layout and variables are for modules, not for checkpoints",
                "leave them out",
            )
        request = make_request(model, config)
        report = _checkpoints(a, b, level or "bits", request, inputs, options, progress)
    else:
        from convert.compare.modules import Hints, compare_modules

        if model is not None or config is not None:
            raise UsageError(
                "model and config are for checkpoints, not for modules", "leave them out"
            )
        hints = Hints(layers, layout, variables)
        report = compare_modules(
            (a, b), titles, (inputs, flax_inputs), level or "outputs", hints, options
        )
    report.versions, report.created = versions(), now()
    report.seconds = round(time.perf_counter() - started, 3)
    return report


def _checkpoints(
    a: Source,
    b: Source,
    level: Level,
    request: Request,
    inputs: Any,
    options: Settings,
    progress: Progress,
) -> Report:
    from convert.compare.checkpoints import certificate_beside, compare_checkpoints

    report = Report(os.fspath(a), os.fspath(b), level)
    with ExitStack() as stack:
        sides: list[tuple[Reader, Plan]] = []
        states = []
        readers = [
            stack.enter_context(open_checkpoint(hub.locate(source), prefer))
            for source, prefer in ((a, "torch"), (b, "flax"))
        ]
        labels = [read_label(reader) for reader in readers]
        # A layout that came with one side is that of the other too, where it says nothing.
        shared = Request(layout=next((x.layout for x in labels if x.layout is not None), None))
        for reader, label in zip(readers, labels, strict=True):
            silent = request == UNSTATED and label.model is None and label.layout is None
            made = make_plan(reader, label, "torch", request=shared if silent else request)
            made, state = besides(reader, made, stack)
            sides.append((reader, made))
            states.append(state)
        first, second = sides
        if first[1].model is not second[1].model:
            names = first[1].title, second[1].title
            raise UsageError(f"{a} is {names[0]}, {b} is {names[1]}", "compare two of one model")
        report.notices = list(dict.fromkeys(n for _, p in sides for n in p.notices))
        report.certificate = certificate_beside([reader.path for reader, _ in sides])
        compare_training(states[0], states[1], report)
        compare_checkpoints(first, second, report, inputs, options, progress)
    return report


def prover(reader: Reader, request: Request, level: Level) -> Callable[[Path], dict[str, object]]:
    """Compares the source that is being converted with the result that is not yet committed."""

    def prove(written: Path) -> dict[str, object]:
        from convert.compare.checkpoints import compare_checkpoints

        report = Report(reader.path.name, written.name, level)
        with open_checkpoint(written) as result:
            sides = [
                (r, make_plan(r, read_label(r), "torch", request=request)) for r in (reader, result)
            ]
            compare_checkpoints(sides[0], sides[1], report, None, Settings())
        if report.verdict == "different":
            bad = next((row.name for row in report.rows if row.judged and not row.same), None)
            raise NotEquivalent(
                f"the result computes something else, first in {bad or report.differences[0].name}",
                "nothing was kept; the model's twins differ, please report it",
            )
        worst = report.worst
        assert worst is not None
        found: dict[str, object] = {
            "level": level,
            "outputs": len(report.outputs),
            "worst": {
                "name": worst.name,
                "error": worst.error,
                "noise": worst.noise,
                "ratio": worst.ratio,
            },
        }
        if level != "outputs":
            found["gradients"] = len(report.gradients)
        if level == "training":
            found["training"] = {t.optimizer: t.steps for t in report.training}
        return found

    return prove
