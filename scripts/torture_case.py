"""What torture tries: a checkpoint that takes another's place, and what readers see of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import convert
from convert.engine import commit as commit_module
from convert.training_state import storage
from convert.training_state.besides import read_training
from convert.training_state.state import Group, OptimizerState, TrainingState
from zoo.checkpoint import hashes
from zoo.checkpoint.label import Label, read_label
from zoo.containers import open_checkpoint
from zoo.containers.base import TensorInfo
from zoo.containers.safetensors_file import SafetensorsWriter
from zoo.models.mlp import MODEL
from zoo.models.mlp.config import Config

TARGETS = {
    "safetensors": "b.safetensors",
    "msgpack": "b.msgpack",
    "pt": "b.pt",
    "orbax": "b.flax",
    "shards": "b",
}
HOOKED = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "pwrite", "truncate")
KILLED = 137
LAYERS = {"orbax": 32}  # so many that a conversion has 400 calls to crash after; else 96
WIDTH = 32
Seen = tuple[Any, ...]


def make_source(
    path: Path, layers: int, factor: float, steps: int, activation: Any, training: bool
) -> Path:
    """A checkpoint whose weights, config and optimizer say which of the two it is."""
    label = Label(MODEL, Config((WIDTH,) * layers + (16,), activation))
    shapes = MODEL.layout_of(label.config).shapes("torch")
    rng = np.random.default_rng(0)
    arrays = {n: np.asarray(factor * rng.standard_normal(s), np.float32) for n, s in shapes.items()}
    infos = {n: TensorInfo("F32", a.shape) for n, a in arrays.items()}
    with SafetensorsWriter(path, infos, {"format": "pt"} | label.to_metadata()) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
        writer.finish()
    if training:
        slots = {s: {n: a * factor for n, a in arrays.items()} for s in ("exp_avg", "exp_avg_sq")}
        options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
        groups = [Group(tuple(arrays), {**options, "amsgrad": False, "maximize": False})]
        state = OptimizerState("AdamW", groups, slots, dict.fromkeys(arrays, steps))
        file = path.with_name(f"{path.name}.optimizer.safetensors")
        storage.write(file, TrainingState([state], data={"step": steps}))
    return path


def run(source: Path, target: Path, **told: Any) -> None:
    """The conversion that is tried."""
    framework = "torch" if target.suffix in (".safetensors", ".pt") else "flax"
    if framework == "torch":
        told |= {"dialect": None, "tree": "nnx"}
    if target.name == TARGETS["shards"]:
        told |= {"max_shard_size": 20_000, "to": "safetensors"}
    convert.convert(source, target, framework=framework, force=True, **told)


def see(target: Path) -> Seen:
    """What a reader gets: weights, config, updates of the optimizer, and whether all are intact."""
    with open_checkpoint(target, "flax") as reader:
        weights = {n: hashes.of("sha256", reader.read(n)) for n in sorted(reader.tensors)}
        label = read_label(reader)
        if label.problem is not None:
            raise label.problem
    found = read_training(target)
    steps = sorted({n for o in found.optimizers for n in o.steps.values()})
    intact = convert.check(target).intact
    return tuple(weights.items()), label.config, tuple(steps), intact


def in_child(work: Callable[[], None]) -> int:
    """The exit status of a forked process: 0 where the work was done."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def hook(count: list[int], last: int) -> None:
    """End the process after so many of the calls that change the disk, or in the middle of one that
    writes."""

    def at_last() -> bool:
        count[0] += 1
        return count[0] == last

    def hooked(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kw: Any) -> Any:
            result = real(*args, **kw)
            if at_last():
                os._exit(KILLED)
            return result

        return call

    real = os.pwrite

    def pwrite(fd: int, data: Any, offset: int) -> int:
        if at_last():
            real(fd, memoryview(data)[: len(data) // 2], offset)
            os._exit(KILLED)
        return real(fd, data, offset)

    os.pwrite = pwrite
    for name in HOOKED:
        setattr(os, name, hooked(getattr(os, name)))
    commit_module._exchange = hooked(commit_module._exchange)


class Case:
    """A container, with or without an optimizer: a folder with what was converted before, and what
    readers see of the old and the new."""

    def __init__(
        self, folder: Path, container: str, training: bool, layers: int | None = None
    ) -> None:
        self.name = f"{container}, {'with' if training else 'without'} an optimizer"
        self.folder, self.trial = folder, folder / "trial"
        torch = container in ("safetensors", "pt")
        n = layers or LAYERS.get(container, 96)
        first = make_source(folder / "one.safetensors", n, 1.0, 5, "relu", training)
        second = make_source(folder / "two.safetensors", n, 2.0, 9, "tanh", training)
        (folder / "old").mkdir(parents=True)
        if torch:  # what goes to torch comes from Flax
            for source in (first, second):
                run(source, source.with_suffix(".msgpack"))
        first, second = (s.with_suffix(".msgpack") if torch else s for s in (first, second))
        self.source, name = second, TARGETS[container]
        run(first, folder / "old" / name)
        shutil.copytree(folder / "old", folder / "new")
        run(second, folder / "new" / name)
        self.old, self.new = see(folder / "old" / name), see(folder / "new" / name)
        assert self.old[:3] != self.new[:3]
        assert self.new[3]
        self.target = self.trial / name

    def fresh(self) -> None:
        """The old checkpoint, as it was."""
        shutil.rmtree(self.trial, ignore_errors=True)
        shutil.copytree(self.folder / "old", self.trial)

    def is_new(self) -> bool:
        """Whether every file is, byte for byte, as a conversion leaves it that nothing befell."""
        timed = ("certificate.json", "_CHECKPOINT_METADATA")
        whole, here = (
            {
                f.relative_to(folder): f.read_bytes()
                for f in folder.rglob("*")
                if f.is_file() and not f.name.endswith(timed)
            }
            for folder in (self.folder / "new", self.trial)
        )
        return whole == here

    def verdict(self) -> str:
        """What is there now: "old", "new" or neither; and that the next one to clean up changes
        nothing of that."""
        try:
            found = see(self.target)
            convert.clean(self.trial)
            if see(self.target) != found:
                return "changed by clean"
        except Exception as e:
            return f"lost: {type(e).__name__}: {e}"
        if [p.name for p in self.trial.iterdir() if p.name.startswith(".")]:
            return "not cleaned"
        return "old" if found == self.old else "new" if found == self.new else "mixed"
