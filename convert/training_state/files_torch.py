"""Optimizers in files of torch.save: `{"state": ..., "param_groups": ...}`, wherever it lies."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convert.training_state.data import is_plain
from convert.training_state.lazy import Lazy
from convert.training_state.ownership import Parameters, pair
from convert.training_state.rules import rule_of, rules
from convert.training_state.state import Group, OptimizerState
from zoo.checkpoint.problems import dims
from zoo.containers.base import Reader, TensorInfo
from zoo.containers.dtypes import code_of
from zoo.containers.errors import CorruptInput, UsageError
from zoo.layout.ops import Shape

_GROUP = re.compile(r"(?:(.*)\.)?param_groups\.(\d{1,6})\.params", re.DOTALL)
_WORD = re.compile(r"_?(optimizers?|optim|opt)(_?states?)?(_?dict)?_?", re.IGNORECASE)


def find(reader: Reader) -> dict[str, int]:
    """Where the file holds optimizers ("" if it is one itself), and how many groups each has."""
    groups: dict[str, set[int]] = {}
    for name in reader.extras:
        if match := _GROUP.fullmatch(name):
            groups.setdefault(match[1] or "", set()).add(int(match[2]))
    return {root: len(numbers) for root, numbers in groups.items()}


def title(root: str) -> str:
    """What an optimizer is of, by where it lies: "actor" for `actor_optimizer`, "" if untold."""
    words = [_WORD.sub("", part) for part in root.split(".")]
    return ".".join(word for word in words if word and word not in ("state_dict", "state"))


@dataclass
class _Raw:
    """One optimizer as the file has it: parameters by what the file calls them."""

    root: str
    groups: list[list[Any]] = field(default_factory=list)  # keys of parameters
    names: list[list[str]] | None = None
    options: list[dict[str, Any]] = field(default_factory=list)
    # key of a parameter -> slot -> the tensor's name in the file
    state: dict[str, dict[str, str]] = field(default_factory=dict)
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)  # the same, of plain numbers
    used: set[str] = field(default_factory=set)
    notices: list[str] = field(default_factory=list)


def read(
    reader: Reader,
    root: str,
    count: int,
    parameters: Parameters,
    name: str,
    trainer: bool = False,
) -> tuple[OptimizerState, set[str]]:
    """The optimizer `name` below `root`, and the file's names that it consists of.

    Moments stay in the file until they are looked at; steps and options are read. Raises ZooError
    where it is not understood: an unknown rule, parameters that cannot be told.
    """
    raw = _collect(reader, root, count)
    keys = [str(key) for group in raw.groups for key in group]
    if len(set(keys)) < len(keys):
        raise CorruptInput(
            f"{root or reader.path}: a parameter stands twice in its groups",
            "save the optimizer's state_dict() again",
        )
    if strangers := sorted((raw.state.keys() | raw.numbers.keys()) - set(keys)):
        raise CorruptInput(
            f"{root or reader.path}: state of parameters that are in no group: "
            + ", ".join(strangers[:5]),
            "save the optimizer's state_dict() again",
        )
    kept: list[Mapping[str, Any]] = [*raw.state.values(), *raw.numbers.values()]
    slots = {slot for state in kept for slot in state} - {"step"}
    rule = rule_of(raw.options[0], slots)
    if rule is None:
        raise _unknown(raw, slots)
    shapes = [_shape(reader, raw, key, rules()[rule].scalars) for key in keys]
    sizes = [len(group) for group in raw.groups]
    found = pair(parameters, sizes, raw.names, shapes, name, trainer)
    notices = list(raw.notices)
    if found.rule:
        notices.append(f"its parameters have no names: paired by {found.rule}")
    names = dict(zip(keys, (n for group in found.names for n in group), strict=True))
    state = OptimizerState(
        rule=rule,
        groups=[
            Group(tuple(group), options)
            for group, options in zip(found.names, raw.options, strict=True)
        ],
        slots=_slots(reader, raw, names, sorted(slots, key=rules()[rule].slots.index)),
        steps=_steps(reader, raw, names),
        name=name,
        notices=notices,
    )
    return state, raw.used


def _collect(reader: Reader, root: str, count: int) -> _Raw:
    """Sort everything below `root` into groups, options and states."""
    raw = _Raw(root)
    prefix = f"{root}." if root else ""
    given: list[list[str]] = []
    for i in range(count):
        start = f"{prefix}param_groups.{i}."
        keys = reader.extras.get(f"{start}params")
        if not isinstance(keys, list):
            raise CorruptInput(
                f"{root or reader.path}: param_groups {i} has no list of params",
                "save the optimizer's state_dict() again",
            )
        names = reader.extras.get(f"{start}param_names")
        if names is None and keys and all(isinstance(key, str) for key in keys):
            names = keys  # torch.distributed.checkpoint's get_optimizer_state_dict
        raw.groups.append(keys)
        raw.options.append(_options(reader, start, raw))
        if names is not None and len(names) == len(keys):
            given.append([str(name) for name in names])
        elif not keys:
            given.append([])
    if len(given) == count and any(given):
        raw.names = given
    _state(reader, f"{prefix}state", raw)
    return raw


def _options(reader: Reader, start: str, raw: _Raw) -> dict[str, Any]:
    """One group's options as plain values; a learning rate may be a tensor."""
    options: dict[str, Any] = {}
    for name in (*reader.extras, *reader.tensors):
        if not name.startswith(start):
            continue
        raw.used.add(name)
        key = name.removeprefix(start)
        if name in reader.tensors:
            if reader.tensors[name].size == 1:
                options[key] = reader.read(name).item()
            else:
                raw.notices.append(f"not kept, no plain value: {name}")
        elif key not in ("params", "param_names"):
            if is_plain(reader.extras[name]):
                options[key] = reader.extras[name]
            else:
                raw.notices.append(f"not kept, no plain value: {name}")
    return options


def _state(reader: Reader, start: str, raw: _Raw) -> None:
    """What is kept for each parameter, by the parameter's key."""
    if reader.extras.get(start) == {}:
        raw.used.add(start)  # an optimizer that never made a step
    for name in (*reader.tensors, *reader.extras):
        key, dot, slot = name.removeprefix(f"{start}.").rpartition(".")
        if not name.startswith(f"{start}.") or not dot:
            continue
        raw.used.add(name)
        if name in reader.tensors:
            raw.state.setdefault(key, {})[slot] = name
        elif isinstance(reader.extras[name], int | float):  # from before it was a tensor
            raw.numbers.setdefault(key, {})[slot] = reader.extras[name]
        elif reader.extras[name] is not None:  # SGD without momentum keeps None
            raw.notices.append(f"not kept, no plain value: {name}")


def _shape(reader: Reader, raw: _Raw, key: str, scalars: Sequence[str]) -> Shape | None:
    """The shape of a parameter's moments; None where it has none."""
    state = raw.state.get(key, {})
    shapes = {
        reader.tensors[name].shape for slot, name in state.items() if slot not in ("step", *scalars)
    }
    if len(shapes) > 1:
        raise CorruptInput(
            f"{raw.root or reader.path}: the moments of parameter {key} have the shapes "
            + ", ".join(map(dims, sorted(shapes))),
            "save the optimizer's state_dict() again",
        )
    return next(iter(shapes), None)


def _slots(
    reader: Reader, raw: _Raw, names: Mapping[str, str], slots: list[str]
) -> dict[str, Lazy]:
    made = {slot: Lazy() for slot in slots}
    for key, name in names.items():
        for slot, stored in raw.state.get(key, {}).items():
            if slot != "step":
                made[slot].add_tensor(name, reader, stored)
        for slot, value in raw.numbers.get(key, {}).items():
            if slot != "step":
                array = np.asarray(value)
                made[slot].add(name, TensorInfo(code_of(array.dtype), ()), array.copy)
    return made


def _steps(reader: Reader, raw: _Raw, names: Mapping[str, str]) -> dict[str, int]:
    steps = {}
    for key, name in names.items():
        stored = raw.state.get(key, {}).get("step")
        value = raw.numbers.get(key, {}).get("step") if stored is None else reader.read(stored)
        if value is not None:
            count = np.asarray(value, np.float64)
            if count.size != 1 or not count.item() >= 0 or not count.item().is_integer():
                raise CorruptInput(
                    f"{raw.root or reader.path}: the step of parameter {key} counts no updates",
                    "save the optimizer's state_dict() again",
                )
            steps[name] = int(count.item())
    return steps


def _unknown(raw: _Raw, slots: set[str]) -> UsageError:
    return UsageError(
        f"{raw.root or 'the file'} holds an optimizer that is not known: its options are "
        f"{', '.join(raw.options[0]) or 'none'}, its states {', '.join(sorted(slots)) or 'none'}",
        f"known are {', '.join(rules())}",
    )
