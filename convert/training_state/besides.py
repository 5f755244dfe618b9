"""Everything in a training checkpoint that is not the weights: optimizers, averages, counters.

Found in plain torch dicts, Lightning's `.ckpt`, directories of transformers' Trainer, files of
stable-baselines3, Orbax and msgpack checkpoints of Flax, and in our own `optimizer.safetensors`.
No framework is imported and nothing is unpickled.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from convert.training_state import averages, data, files_flax, files_torch, storage
from convert.training_state.lazy import info_of, loaded
from convert.training_state.ownership import Parameters
from convert.training_state.rules import rules
from convert.training_state.state import OptimizerState, TrainingState
from zoo import hub
from zoo.checkpoint.generation import check_weights
from zoo.checkpoint.label import read_label
from zoo.checkpoint.plan import Plan, make_plan
from zoo.checkpoint.problems import dims
from zoo.checkpoint.request import Request, make_request
from zoo.containers import filenames, json_text, open_checkpoint
from zoo.containers.base import Reader
from zoo.containers.errors import CorruptInput, ZooError
from zoo.layout import Layout, Tree

_LARGEST = 64 << 20  # bytes of what a trainer keeps as JSON
_TRAINER_STATE = "trainer_state.json"
_TRAINER_REST = ("rng_state*.pth", "training_args.bin", "scaler.pt")
_MEMBER = "optimizer.pth"  # what stable-baselines3's optimizers are called, after a name


@dataclass
class Besides:
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
    prefix: str | None = None,
    layout: Layout | None = None,
    learning_rate: float | None = None,
) -> TrainingState:
    """Everything in the checkpoint at `source` that is not weights, in canonical form.

    The model is identified as for a conversion, `model`, `config` and `prefix` help; with `layout`,
    a checkpoint without weights does too. Its `notices` say by which rule parameters were told
    apart and what was not kept. Raises ZooError where there is an optimizer and none is understood;
    one of several that is not becomes a notice. `learning_rate` is that of the last update, for a
    momentum that optax keeps times it (see `optax_state.from_flat`).
    """
    with ExitStack() as stack:
        reader = stack.enter_context(open_checkpoint(hub.locate(source)))
        label, plan = read_label(reader), None
        requests = [make_request(model, config, prefix=prefix)]
        requests += [Request(layout=layout, prefix=prefix)] * (layout is not None)
        for request in requests:
            try:
                plan = plan or make_plan(reader, label, None, request=request)
            except ZooError:
                if layout is None:
                    raise
        if layout is None:
            assert plan is not None
            layout = plan.layout
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
) -> Besides:
    """What is in an open checkpoint besides its weights, and in the files that belong to it.

    Files that have to stay open are entered into `stack`. An optimizer that is not understood is
    one of `problems`.
    """
    stored = list(reader.tensors) if plan and reader.container == "torch" else []
    search = _Search(
        reader, layout, plan, stack, learning_rate, Parameters.of(layout, plan, stored)
    )
    if "zoo.optimizer" in reader.metadata:
        search.found = Besides(storage.read_from(reader))
        search.leave_out_strangers()
        return search.found
    search.inside()
    search.in_members()
    search.beside_trainer()
    found = search.found
    found.state.notices += data.schedule_notices(found.state.data)
    search.ours()
    search.leave_out_strangers()
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
    found = find(reader, plan.layout, plan, stack, learning_rate)
    told = [*found.state.notices]
    for e in found.problems:
        if isinstance(e, CorruptInput) and not damaged:
            raise e
        details = f" ({'; '.join(e.details)})" if e.details else ""
        told.append(f"NOT converted: {e.problem}{details}. To have it converted: {e.advice}")
    left = plan.left.without(found.used)
    return replace(plan, left=left, told=(*plan.told, *told)), found.state


@dataclass
class _Search:
    """Of one open checkpoint: every step adds to what was found."""

    reader: Reader
    layout: Layout
    plan: Plan | None
    stack: ExitStack
    learning_rate: float | None
    parameters: Parameters
    found: Besides = field(default_factory=Besides)

    def inside(self) -> None:
        """What lies in the checkpoint's own tree."""
        reader, plan = self.reader, self.plan
        tree: Tree = plan.source_tree if plan else "torch" if reader.container == "torch" else "nnx"
        tensors = plan.left.tensors if plan else reader.tensors
        roots = set(files_torch.find(reader))
        self.torch_optimizers(reader, files_torch.title)
        if self.layout.side(tree) == "flax":
            places = files_flax.find((*tensors, *reader.extras), alone=plan is None)
            for root, names in places.items():
                self.flax_optimizers(root, names)
            roots |= set(places)
        used = self.found.used

        def free(names: Iterable[str]) -> list[str]:
            return [n for n in names if n not in used and not _below_any(n, roots)]

        self.averaged_weights(free(tensors), tree)
        extras, scalars = free(reader.extras), free(tensors) if plan else []
        self.found.state.data, rest = data.collect(reader, extras, scalars)
        used |= {*extras, *scalars} - set(rest)

    def torch_optimizers(
        self, reader: Reader, name_of: Callable[[str], str], trainer: bool = False
    ) -> None:
        """torch's optimizers in a file; `name_of` a place there is what the one there is called."""
        for root, count in files_torch.find(reader).items():
            try:
                state, used = files_torch.read(
                    reader, root, count, self.parameters, name_of(root), trainer
                )
            except ZooError as e:
                self.found.problems.append(e)
                continue
            self.found.state.optimizers.append(state)
            self.found.used |= used

    def flax_optimizers(self, root: str, names: list[str]) -> None:
        """The optimizers in one optax state."""
        try:
            states = files_flax.read(self.reader, root, names, self.layout, self.learning_rate)
        except ZooError as e:
            self.found.problems.append(e)
            return
        for state in states:
            state.name = state.name or files_torch.title(root)
        self.found.state.optimizers += states
        self.found.used |= set(names)

    def averaged_weights(self, names: Iterable[str], tree: Tree) -> None:
        """Averaged weights; of several the first."""
        state = self.found.state
        for root, below in averages.find(names).items():
            if state.ema:
                state.notices.append(f"of several averages the first is kept, not {root}")
                continue
            try:
                state.ema, used = averages.read(
                    self.reader, root, below, self.layout, tree, self.parameters
                )
                self.found.used |= used
            except ZooError as e:
                self.found.problems.append(e)

    def in_members(self) -> None:
        """The optimizers in a file of stable-baselines3."""
        from zoo.containers.torch_file import TorchReader

        for member in self.reader.beside:
            if not member.endswith(_MEMBER):
                continue
            name = files_torch.title(member.removesuffix(".pth"))
            try:
                inner = self.stack.enter_context(TorchReader(self.reader.path, member))
            except ZooError as e:
                self.found.problems.append(e)
                continue
            before = len(self.found.state.optimizers)
            self.torch_optimizers(inner, lambda root, name=name: name)  # type: ignore[misc]
            if len(self.found.state.optimizers) > before:
                self.found.used.add(member)

    def beside_trainer(self) -> None:
        """What transformers' Trainer puts beside `model.safetensors`."""
        folder, state = self.reader.path.parent, self.found.state
        if not filenames.is_whole(self.reader.path) or state.optimizers:
            return
        for name in filenames.TRAINER_OPTIMIZERS:
            if inner := self._opened(folder / name):
                self.torch_optimizers(inner, lambda root: "", trainer=True)
        kept = dict(state.data)
        if (folder / _TRAINER_STATE).is_file():
            kept |= self._json(folder / _TRAINER_STATE)
        if inner := self._opened(folder / "scheduler.pt"):
            try:
                numbers, _ = data.collect(inner, inner.extras, inner.tensors)
                kept |= {f"scheduler.{name}": value for name, value in numbers.items()}
            except ZooError as e:
                self.found.problems.append(e)
        state.data = kept
        if kept or state.optimizers:
            rest = sorted(p.name for pattern in _TRAINER_REST for p in folder.glob(pattern))
            if rest:
                state.notices.append(f"not kept, code or random states: {', '.join(rest)}")

    def _opened(self, path: Path) -> Reader | None:
        """The file, if it is there and can be read."""
        if not path.is_file():
            return None
        try:
            return self.stack.enter_context(open_checkpoint(path))
        except ZooError as e:
            self.found.problems.append(e)
            return None

    def _json(self, path: Path) -> dict[str, Any]:
        try:
            value = json_text.read(path, _LARGEST)
            if not isinstance(value, dict):
                raise ValueError("not a JSON object")
        except ValueError as e:
            problem = CorruptInput(f"{path} cannot be read: {e}", "mend or remove it")
            self.found.problems.append(problem)
            return {}
        return value

    def ours(self) -> None:
        """The `optimizer.safetensors` that a conversion put beside the weights."""
        path = storage.beside(self.reader.path)
        if path is None:
            return
        state = self.found.state
        if state.optimizers or state.ema:
            state.notices.append(f"not read: {path.name}; the checkpoint holds its own")
            return
        from zoo.containers.safetensors_file import SafetensorsReader

        try:
            reader = self.stack.enter_context(SafetensorsReader(path))
            check_weights(reader.metadata.get(storage.WEIGHTS), path, self.reader.path)
            ours = storage.read_from(reader)
        except ZooError as e:
            self.found.problems.append(e)
            return
        ours.data = {**ours.data, **state.data}
        ours.notices = state.notices
        self.found.state = ours

    def leave_out_strangers(self) -> None:
        """Optimizers whose names and shapes are not the model's become problems."""
        good, shapes = [], self.parameters.shapes
        for optimizer in self.found.state.optimizers:
            scalars = rules()[optimizer.rule].scalars
            wrong = [f"{n} is not a parameter" for n in optimizer.params if n not in shapes]
            wrong += [
                f"{slot} of {name} is {dims(shape)}, the parameter is {dims(shapes[name])}"
                for slot, arrays in optimizer.slots.items()
                for name in arrays
                if name in shapes
                and slot not in scalars
                and (shape := info_of(arrays, name).shape) != shapes[name]
            ]
            if not wrong:
                good.append(optimizer)
                continue
            problem = f"the {optimizer.rule} state is not of this model: {len(wrong)} differ"
            advice = "give the checkpoint that it belongs to"
            self.found.problems.append(ZooError(problem, advice, wrong[:8]))
        self.found.state.optimizers = good


def _below_any(name: str, roots: Iterable[str]) -> bool:
    return any(name.startswith(f"{root}.") or not root for root in roots)


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
