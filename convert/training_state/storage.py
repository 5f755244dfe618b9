"""`optimizer.safetensors`: a training state in canonical form, beside the weights.

Specified in docs/layout.md. A moment is the tensor `SLOT.NAME` with its parameter's canonical name
and shape, `OPTIMIZER/SLOT.NAME` where there are several optimizers; an averaged weight is
`ema.NAME`. What is not a tensor is JSON in the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.training_state.lazy import Lazy, info_of
from convert.training_state.rules import rules
from convert.training_state.state import Group, OptimizerState, TrainingState
from zoo.checkpoint import hashes
from zoo.containers import committed, filenames, json_text
from zoo.containers.base import Reader, TensorInfo
from zoo.containers.errors import CorruptInput, UsageError
from zoo.containers.safetensors_file import SafetensorsReader, SafetensorsWriter

VERSION = 1
WEIGHTS = "zoo.weights"  # the key of what names the weights
_AGAIN = "convert the checkpoint again, or move the file away to go on without it"


def beside(checkpoint: Path) -> Path | None:
    """The `optimizer.safetensors` that belongs to a checkpoint, if there is one."""
    places = [committed.beside(checkpoint, filenames.OPTIMIZER)]
    if filenames.is_whole(checkpoint):
        places.append(checkpoint.with_name(filenames.OPTIMIZER))
    return next((place for place in places if place.is_file()), None)


def of_directory(directory: Path) -> Path | None:
    """The file in a directory that holds the optimizer of the checkpoint which the directory is."""
    places = (directory / name for name in (filenames.OPTIMIZER, *filenames.TRAINER_OPTIMIZERS))
    return next((place for place in places if place.is_file()), None)


def tensors(state: TrainingState) -> Iterator[tuple[str, Mapping[str, np.ndarray], str]]:
    """Every tensor of the file: its name there, and where it is in the state."""
    several = len(state.optimizers) > 1
    for optimizer in state.optimizers:
        front = f"{optimizer.name}/" if several else ""
        for slot, arrays in optimizer.slots.items():
            for name in arrays:
                yield f"{front}{slot}.{name}", arrays, name
    for name in state.ema:
        yield f"ema.{name}", state.ema, name


def header(state: TrainingState) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of the file's tensors."""
    return {stored: info_of(arrays, name) for stored, arrays, name in tensors(state)}


def write(path: Path, state: TrainingState, kind: str = "", weights: str = "") -> dict[str, str]:
    """Write `state` to `path`, which must not exist; the hash of every tensor, of the kind `kind`
    (see `zoo.checkpoint.hashes`; none without). `weights` is the fingerprint of those that it
    belongs to, where they are one file.

    The same state gives the same bytes. One tensor is in memory at a time. UsageError for several
    optimizers that are not told apart by their names.
    """
    names = [optimizer.name for optimizer in state.optimizers]
    wrong = len(names) > 1 and (len(set(names)) < len(names) or any("/" in n for n in names))
    if wrong or (len(names) > 1 and "" in names):
        raise UsageError(
            f"{len(names)} optimizers are called {', '.join(map(repr, names))}",
            "give each a name of its own, without '/'",
        )
    found: dict[str, str] = {}
    metadata = _metadata(state) | ({WEIGHTS: weights} if weights else {})
    with SafetensorsWriter(path, header(state), metadata) as writer:
        for stored, arrays, name in tensors(state):
            array = np.asarray(arrays[name], order="C")
            if kind:
                found[stored] = hashes.of(kind, array)
            writer.write(stored, array)
        writer.finish()
    return found


def differences(
    path: Path, state: TrainingState, written: Mapping[str, str], kind: str
) -> list[str]:
    """What of a file just written is not as it was meant, read from the disk again."""
    with SafetensorsReader(path) as reader:
        wrong = [k for k, v in _metadata(state).items() if reader.metadata.get(k) != v]
        wrong += sorted(reader.tensors.keys() ^ written.keys())
        return wrong + [
            name
            for name in reader.tensors.keys() & written.keys()
            if hashes.of(kind, reader.read(name)) != written[name]
        ]


def read(path: Path) -> TrainingState:
    """The state in a file, all of it in memory; CorruptInput for what `write` never wrote."""
    with SafetensorsReader(path) as reader:
        state = read_from(reader)
        for optimizer in state.optimizers:
            optimizer.slots = {slot: dict(arrays) for slot, arrays in optimizer.slots.items()}
        state.ema = dict(state.ema)
    return state


def read_from(reader: Reader) -> TrainingState:
    """The same of an open file, whose tensors are read when they are looked at."""
    try:
        described = json_text.parse(reader.metadata["zoo.optimizer"])
        training = json_text.parse(reader.metadata["zoo.training"])
        version = described["version"]
        if version > VERSION:
            raise UsageError(
                f"{reader.path} has version {version} of the format, this one knows {VERSION}",
                "upgrade zooconvert",
            )
        several = len(described["optimizers"]) > 1
        optimizers = [_optimizer(reader, o, several) for o in described["optimizers"]]
        ema = _below(reader, "ema.")
        data = dict(training["data"])
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        why = f"{type(e).__name__}: {e}"
        raise CorruptInput(f"{reader.path} cannot be understood: {why}", _AGAIN) from None
    state = TrainingState(optimizers, ema, data)
    if strangers := sorted(reader.tensors.keys() - header(state).keys()):
        raise CorruptInput(
            f"{reader.path}: {len(strangers)} tensors are of no optimizer: {strangers[0]}", _AGAIN
        )
    return state


def _metadata(state: TrainingState) -> dict[str, str]:
    described = {
        "version": VERSION,
        "optimizers": [_describe(optimizer) for optimizer in state.optimizers],
    }
    return {
        "zoo.optimizer": _json(described),
        "zoo.training": _json({"data": dict(state.data)}),
    }


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _describe(optimizer: OptimizerState) -> dict[str, Any]:
    return {
        "name": optimizer.name,
        "rule": optimizer.rule,
        "slots": list(optimizer.slots),
        "groups": [{"params": list(g.params), "options": g.options} for g in optimizer.groups],
        "steps": _short(optimizer),
    }


def _short(optimizer: OptimizerState) -> int | dict[str, int]:
    """One number where every parameter has it, else a number for each that has one."""
    counts = set(optimizer.steps.values())
    if len(counts) == 1 and optimizer.steps.keys() == set(optimizer.params):
        return counts.pop()
    return dict(optimizer.steps)


def _optimizer(reader: Reader, data: Mapping[str, Any], several: bool) -> OptimizerState:
    groups = [
        Group(tuple(g["params"]), {k: _tupled(v) for k, v in g["options"].items()})
        for g in data["groups"]
    ]
    if data["rule"] not in rules():
        raise ValueError(f"the optimizer {data['rule']!r} is not known")
    front = f"{data['name']}/" if several else ""
    slots = {slot: _below(reader, f"{front}{slot}.") for slot in data["slots"]}
    if strange := slots.keys() - set(rules()[data["rule"]].slots):
        raise ValueError(f"{data['rule']} does not keep {min(strange)}")
    params = [name for group in groups for name in group.params]
    if len(set(params)) < len(params):
        raise ValueError("a parameter stands twice in its groups")
    lost = {n for arrays in slots.values() for n in arrays} - set(params)
    if lost:
        raise ValueError(f"moments of {min(lost)}, which is in no group")
    steps = data["steps"]
    counts = dict.fromkeys(params, steps) if isinstance(steps, int) else dict(steps)
    if counts.keys() - set(params) or not all(type(n) is int and n >= 0 for n in counts.values()):
        raise ValueError("its steps are not counts of its parameters' updates")
    return OptimizerState(data["rule"], groups, slots, counts, data["name"])


def _below(reader: Reader, prefix: str) -> Lazy:
    found = Lazy()
    for name in reader.tensors:
        if name.startswith(prefix):
            found.add_tensor(name.removeprefix(prefix), reader, name)
    return found


def _tupled(value: Any) -> Any:
    """torch's options hold tuples (betas), never lists."""
    return tuple(map(_tupled, value)) if isinstance(value, list) else value
