"""Everything in a training checkpoint that is not the weights: optimizers, averages, counters.

Found in plain torch dicts, Lightning's `.ckpt`, directories of transformers' Trainer, files of
stable-baselines3, Orbax and msgpack checkpoints of Flax, and in our own `optimizer.safetensors`.
No framework is imported and nothing is unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from convert.training_state import averages, data, files_flax, files_torch, storage
from convert.training_state.lazy import info_of, loaded
from convert.training_state.ownership import Parameters
from convert.training_state.state import OptimizerState, TrainingState
from zoo import hub
from zoo.checkpoint.identification import dims
from zoo.checkpoint.label import read_label
from zoo.checkpoint.plan import Plan, make_plan
from zoo.containers import open_checkpoint
from zoo.containers.base import Reader
from zoo.containers.errors import CorruptInput, ZooError
from zoo.layout import Layout, Tree
from zoo.loading import make_request

_TRAINER_STATE = "trainer_state.json"
_TRAINER_REST = ("rng_state*.pth", "training_args.bin", "scaler.pt")
_MEMBER = "optimizer.pth"  # what stable-baselines3's optimizers are called, after a name


@dataclass
class Found:
    """What was found. Arrays are read when they are looked at, while the checkpoint is open."""

    state: TrainingState = field(default_factory=TrainingState)
    problems: list[ZooError] = field(default_factory=list)  # why an optimizer is not in `state`
    used: set[str] = field(default_factory=set)  # the checkpoint's names and files that it is from

    def __bool__(self) -> bool:
        return bool(self.state.optimizers or self.state.ema or self.state.data)


def read_training(
    source: str | os.PathLike[str],
    *,
    model: str | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    layout: Layout | None = None,
    learning_rate: float | None = None,
) -> TrainingState:
    """Everything in the checkpoint at `source` that is not weights, in canonical form.

    The model is identified as for a conversion, `model` and `config` help; with `layout`, a
    checkpoint without weights does too. Its `notices` say by which rule parameters were told apart
    and what was not kept. Raises ZooError where there is an optimizer and none is understood; one
    of several that is not becomes a notice. `learning_rate` is that of the last update, for a
    momentum that optax keeps times it (see `optax_state.from_flat`).
    """
    with ExitStack() as stack:
        reader = stack.enter_context(open_checkpoint(hub.locate(source)))
        plan = None
        try:
            request = make_request(model, config)
            plan = make_plan(reader, read_label(reader), None, request=request)
        except ZooError:
            if layout is None:
                raise
        if layout is None:
            assert plan is not None
            layout = plan.model.layout_of(plan.config)
        found = find(reader, layout, plan, stack, learning_rate)
        if found.problems and not found.state.optimizers:
            raise found.problems[0]
        state = found.state
        state.notices += [f"not kept: {e.problem}" for e in found.problems]
        left = plan.left if plan else None
        state.notices += left.without(found.used).notices() if left else []
        for optimizer in state.optimizers:
            optimizer.slots = {slot: loaded(arrays) for slot, arrays in optimizer.slots.items()}
        return replace(state, ema=loaded(state.ema))


def find(
    reader: Reader,
    layout: Layout,
    plan: Plan | None,
    stack: ExitStack,
    learning_rate: float | None = None,
) -> Found:
    """What is in an open checkpoint besides its weights, and in the files that belong to it.

    Files that have to stay open are entered into `stack`. An optimizer that is not understood is
    one of `problems`.
    """
    stored = list(reader.tensors) if plan and reader.container == "torch" else []
    parameters = Parameters.of(layout, plan, stored)
    if "zoo.optimizer" in reader.metadata:
        return _checked(Found(storage.read_from(reader)), parameters)
    found = _inside(reader, layout, plan, parameters, learning_rate)
    _members(reader, parameters, found, stack)
    _trainer(reader, parameters, found, stack)
    found.state.notices += data.schedule_notices(found.state.data)
    _ours(reader, parameters, found, stack)
    _checked(found, parameters)
    _name(found.state.optimizers)
    state = found.state
    for o in state.optimizers:
        of = f"optimizer {o.name}: " if o.name else "optimizer: "
        state.notices += [of + notice for notice in o.notices]
    return found


def besides(
    reader: Reader,
    plan: Plan,
    stack: ExitStack,
    learning_rate: float | None = None,
    damaged: bool = False,
) -> tuple[Plan, TrainingState]:
    """What is in an open checkpoint besides its weights; and the plan, whose notices then say what
    of it was not understood. `learning_rate` is as in `read_training`. What is damaged is an error,
    or with `damaged` a notice too."""
    found = find(reader, plan.model.layout_of(plan.config), plan, stack, learning_rate)
    told = [*found.state.notices]
    for e in found.problems:
        if isinstance(e, CorruptInput) and not damaged:
            raise e
        details = f" ({'; '.join(e.details)})" if e.details else ""
        told.append(f"NOT converted: {e.problem}{details}. To have it converted: {e.advice}")
    left = plan.left.without(found.used)
    return replace(plan, left=left, told=(*plan.told, *told)), found.state


def _inside(
    reader: Reader,
    layout: Layout,
    plan: Plan | None,
    parameters: Parameters,
    learning_rate: float | None,
) -> Found:
    """What lies in the checkpoint's own tree."""
    found = Found()
    tree: Tree = plan.source_tree if plan else "torch" if reader.container == "torch" else "nnx"
    tensors = list(plan.left.tensors if plan else reader.tensors)
    counts = files_torch.find(reader)
    for root, count in counts.items():
        _torch(reader, root, count, parameters, files_torch.title(root), found)
    roots = set(counts)
    if tree != "torch":
        places = files_flax.find((*tensors, *reader.extras), alone=plan is None)
        for root, names in places.items():
            _flax(reader, root, names, layout, learning_rate, found)
        roots |= set(places)
    _rest(reader, layout, tree, plan, parameters, roots, found)
    return found


def _rest(
    reader: Reader,
    layout: Layout,
    tree: Tree,
    plan: Plan | None,
    parameters: Parameters,
    roots: set[str],
    found: Found,
) -> None:
    """Averages and plain data: what does not lie below the `roots` of optimizers."""
    state = found.state
    tensors = plan.left.tensors if plan else reader.tensors
    free = [n for n in tensors if n not in found.used and not _below_any(n, roots)]
    for root, names in averages.find(free).items():
        if state.ema:
            state.notices.append(f"of several averages the first is kept, not {root}")
            continue
        try:
            state.ema, used = averages.read(reader, root, names, layout, tree, parameters)
            found.used |= used
        except ZooError as e:
            found.problems.append(e)
    extras = [n for n in reader.extras if n not in found.used and not _below_any(n, roots)]
    free = [n for n in free if n not in found.used] if plan else []
    state.data, rest = data.collect(reader, extras, free)
    found.used |= {n for n in (*extras, *free) if n not in set(rest)}


def _below_any(name: str, roots: Iterable[str]) -> bool:
    return any(name.startswith(f"{root}.") or not root for root in roots)


def _torch(
    reader: Reader,
    root: str,
    count: int,
    parameters: Parameters,
    name: str,
    found: Found,
    trainer: bool = False,
) -> None:
    try:
        state, used = files_torch.read(reader, root, count, parameters, name, trainer)
    except ZooError as e:
        found.problems.append(e)
        return
    found.state.optimizers.append(state)
    found.used |= used


def _flax(
    reader: Reader,
    root: str,
    names: list[str],
    layout: Layout,
    learning_rate: float | None,
    found: Found,
) -> None:
    try:
        states = files_flax.read(reader, root, names, layout, learning_rate)
    except ZooError as e:
        found.problems.append(e)
        return
    for state in states:
        state.name = state.name or files_torch.title(root)
    found.state.optimizers += states
    found.used |= set(names)


def _members(reader: Reader, parameters: Parameters, found: Found, stack: ExitStack) -> None:
    """The optimizers in a file of stable-baselines3."""
    from zoo.containers.torch_file import TorchReader

    for member in reader.beside:
        if not member.endswith(_MEMBER):
            continue
        name = files_torch.title(member.removesuffix(".pth"))
        try:
            inner = stack.enter_context(TorchReader(reader.path, member))
        except ZooError as e:
            found.problems.append(e)
            continue
        before = len(found.state.optimizers)
        for root, count in files_torch.find(inner).items():
            _torch(inner, root, count, parameters, name, found)
        if len(found.state.optimizers) > before:
            found.used.add(member)


def _trainer(reader: Reader, parameters: Parameters, found: Found, stack: ExitStack) -> None:
    """What transformers' Trainer puts beside `model.safetensors`."""
    folder = reader.path.parent
    if not storage.in_directory(reader.path) or found.state.optimizers:
        return
    for name in storage.TRAINER:
        if (folder / name).is_file():
            try:
                inner = stack.enter_context(open_checkpoint(folder / name))
            except ZooError as e:
                found.problems.append(e)
                continue
            for root, count in files_torch.find(inner).items():
                _torch(inner, root, count, parameters, "", found, trainer=True)
    kept = dict(found.state.data)
    if (folder / _TRAINER_STATE).is_file():
        kept |= _json(folder / _TRAINER_STATE, found)
    if (folder / "scheduler.pt").is_file():
        try:
            inner = stack.enter_context(open_checkpoint(folder / "scheduler.pt"))
            numbers, _ = data.collect(inner, inner.extras, inner.tensors)
            kept |= {f"scheduler.{name}": value for name, value in numbers.items()}
        except ZooError as e:
            found.problems.append(e)
    found.state.data = kept
    if kept or found.state.optimizers:
        rest = sorted(p.name for pattern in _TRAINER_REST for p in folder.glob(pattern))
        if rest:
            found.state.notices.append(f"not kept, code or random states: {', '.join(rest)}")


def _json(path: Path, found: Found) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
    except (ValueError, RecursionError) as e:
        found.problems.append(CorruptInput(f"{path} cannot be read: {e}", "mend or remove it"))
        return {}
    return value


def _ours(reader: Reader, parameters: Parameters, found: Found, stack: ExitStack) -> None:
    """The `optimizer.safetensors` that a conversion put beside the weights."""
    path = storage.beside(reader.path)
    if path is None:
        return
    state = found.state
    if state.optimizers or state.ema:
        state.notices.append(f"not read: {path.name}; the checkpoint holds its own")
        return
    from zoo.containers.safetensors_file import SafetensorsReader

    try:
        ours = storage.read_from(stack.enter_context(SafetensorsReader(path)))
    except ZooError as e:
        found.problems.append(e)
        return
    ours.data = {**ours.data, **state.data}
    ours.notices = state.notices
    found.state = ours


def _checked(found: Found, parameters: Parameters) -> Found:
    """Leave out optimizers whose names and shapes are not the model's, as problems."""
    good = []
    for optimizer in found.state.optimizers:
        wrong = [f"{n} is no parameter" for n in optimizer.params if n not in parameters.shapes]
        wrong += [
            f"{slot} of {name} is {dims(shape)}, the parameter is {dims(parameters.shapes[name])}"
            for slot, arrays in optimizer.slots.items()
            for name in arrays
            if name in parameters.shapes
            and (shape := info_of(arrays, name).shape) != parameters.shapes[name]
            and slot not in files_torch.SCALARS
        ]
        if wrong:
            found.problems.append(
                ZooError(
                    f"the {optimizer.rule} state is not of this model: {len(wrong)} differ",
                    "give the checkpoint that it belongs to",
                    wrong[:8],
                )
            )
        else:
            good.append(optimizer)
    found.state.optimizers = good
    return found


def _name(optimizers: list[OptimizerState]) -> None:
    """A name of its own for each of several, none for a single one."""
    if len(optimizers) == 1:
        optimizers[0].name = ""
        return
    taken: set[str] = set()
    for i, optimizer in enumerate(optimizers):
        name = optimizer.name.replace("/", ".") or "main"
        optimizer.name = name if name not in taken else f"{name}.{i}"
        taken.add(optimizer.name)
