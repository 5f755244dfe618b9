"""Training checkpoints: what stands in them beside weights and optimizer, and how they are written.

A file appears whole or not at all: it is written beside its place, flushed to the disk and renamed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

import zoo
from training.description import Job
from zoo.checkpoint.apply import apply
from zoo.checkpoint.label import Label
from zoo.containers import open_checkpoint
from zoo.containers.base import TensorInfo, fsync
from zoo.containers.dtypes import code_of
from zoo.containers.errors import UsageError
from zoo.containers.safetensors_file import SafetensorsWriter
from zoo.layout import between

SUFFIX = {"torch": ".pt", "flax": ".msgpack"}


def create(job: Job, dtype: str | None = None) -> Any:
    """The fresh module of a job: one seed gives both frameworks the same weights."""
    return zoo.create(
        job.task.preset,
        framework=job.framework,
        seed=job.seed,
        dtype=dtype,
        param_dtype=job.param_dtype,
        **dataclasses.asdict(job.config),
    )


def load(path: Path, job: Job) -> Any:
    """The module in a checkpoint of either framework, as the job computes it."""
    with warnings.catch_warnings():
        # That an optimizer lies beside the weights is not news here.
        warnings.simplefilter("ignore", zoo.LoadNotice)
        return zoo.load(
            path,
            framework=job.framework,
            model=job.model.name,
            config=dataclasses.asdict(job.config),
            dtype=job.dtype if job.dtype == "bfloat16" else None,
            param_dtype=job.param_dtype,
            seed=job.seed,
        )


def fill(path: Path, target: Any, module: Any, rate: float, step: int, name: str = "") -> Any:
    """An optimizer's state in a checkpoint of either framework into `target` (see
    `convert.load_optimizer`); `name` is that of one among several, `rate` the one at `step`."""
    from convert import load_optimizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", zoo.LoadNotice)
        return load_optimizer(
            path, target, module, learning_rate=rate, step=step, name=name or None
        )


def facts(job: Job, step: int) -> dict[str, Any]:
    """What a checkpoint holds beside weights and optimizer: plain data."""
    return {
        "step": step,
        "epoch": step // job.steps_per_epoch,
        "task": job.task.name,
        "config": json.loads(json.dumps(dataclasses.asdict(job.config))),
        "seed": job.seed,
    }


def check(path: Path, job: Job) -> int:
    """The step at which a checkpoint was written. UsageError where it is of another run."""
    if not path.exists():
        raise UsageError(f"{path} does not exist", "give a checkpoint of scripts/train")
    extras = _facts(path, job)
    wrong = [
        f"{name} is {extras[name]!r} there, {wanted!r} here"
        for name, wanted in (("task", job.task.name), ("seed", job.seed))
        if name in extras and extras[name] != wanted
    ]
    if wrong:
        raise UsageError(f"{path} is of another run", "give the same task and --seed", tuple(wrong))
    step = extras.get("step")
    if not isinstance(step, int):
        raise UsageError(
            f"{path} does not say at which step it was written", "give one of scripts/train"
        )
    if step >= job.steps:
        raise UsageError(f"{path} has done {step} steps of {job.steps}", "give more --steps")
    return step


def _facts(path: Path, job: Job) -> dict[str, Any]:
    """The plain data in a checkpoint, or beside its weights once it has been converted."""
    with open_checkpoint(path) as reader:
        extras = dict(reader.extras)
    if "step" in extras:
        return extras
    from convert.training_state.besides import read_training

    config = dataclasses.asdict(job.config)
    return extras | dict(read_training(path, model=job.model.name, config=config).data)


def write(path: Path, save: Callable[[BinaryIO], Any], job: Job) -> None:
    """`save` writes into a file, which then takes `path`; FILE.config.json says what it is."""
    label = Label(job.model, job.config).to_config_json().encode()
    _replace(path.with_name(f"{path.name}.config.json"), lambda file: file.write(label))
    _replace(path, save)


def _replace(path: Path, save: Callable[[BinaryIO], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    fsync(path.parent)


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    _replace(path, lambda file: file.write(text.encode()))


def canonical(job: Job, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of the NNX tree under canonical names."""
    layout = job.model.layout_of(job.config)
    found: dict[str, np.ndarray] = {}
    for source, target in zip(layout.view("nnx"), layout.view("torch"), strict=True):
        if source.tensors:
            ops, _ = between(source, target)
            made = apply(ops, [values[t.name] for t in source.tensors])
            found |= {t.name: a for t, a in zip(target.tensors, made, strict=True)}
    return found


def write_weights(path: Path, job: Job, tensors: Mapping[str, np.ndarray]) -> None:
    """The weights alone, in safetensors under canonical names, float32, each once."""
    layout = job.model.layout_of(job.config)
    wanted = [
        t.name for e in layout.entries if e.constant is None and e.tied_to is None for t in e.torch
    ]
    arrays = {name: np.asarray(tensors[name], np.float32) for name in wanted}
    header = {n: TensorInfo(code_of(a.dtype), a.shape) for n, a in arrays.items()}
    metadata = {"format": "pt", **Label(job.model, job.config).to_metadata()}
    path.parent.mkdir(parents=True, exist_ok=True)
    place = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with SafetensorsWriter(place, header, metadata) as writer:
            for name, array in arrays.items():
                writer.write(name, array)
            writer.finish()
        os.replace(place, path)
    finally:
        place.unlink(missing_ok=True)
    fsync(path.parent)
