"""What befalls a conversion: crashes after each call that changes the disk, kills, interrupted runs
that are resumed, Ctrl-C, rot. Prints a table, and with --write makes it docs/reliability.md.

Every trial replaces a checkpoint by another whose weights, config and optimizer all differ, and
then asks what readers see: the old one whole, the new one whole, or something that never was.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from reliability import write_section
from rich.console import Console
from rich.table import Table

import convert
from convert.engine import commit as commit_module
from convert.training_state import storage
from convert.training_state.besides import read_training
from convert.training_state.state import Group, OptimizerState, TrainingState
from zoo.checkpoint import hashes, slabs
from zoo.checkpoint.label import Label, read_label
from zoo.containers import open_checkpoint
from zoo.containers.base import TensorInfo
from zoo.containers.errors import ZooError
from zoo.containers.safetensors_file import SafetensorsWriter
from zoo.models.mlp import MODEL
from zoo.models.mlp.config import Config

ROOT = Path(__file__).parents[1]
TARGETS = {
    "safetensors": "b.safetensors",
    "msgpack": "b.msgpack",
    "pt": "b.pt",
    "orbax": "b.flax",
    "shards": "b",
}
HOOKED = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "pwrite", "truncate")
KILLED = 137
SIZES = (64, 64, 64, 64, 64, 16)
Seen = tuple[Any, ...]


def make_source(path: Path, factor: float, steps: int, activation: Any, training: bool) -> Path:
    """A checkpoint whose weights, config and optimizer say which of the two it is."""
    label = Label(MODEL, Config(SIZES, activation))
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
    """End the process after so many of the calls that change the disk."""

    def hooked(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kw: Any) -> Any:
            result = real(*args, **kw)
            count[0] += 1
            if count[0] == last:
                os._exit(KILLED)
            return result

        return call

    for name in HOOKED:
        setattr(os, name, hooked(getattr(os, name)))
    commit_module._exchange = hooked(commit_module._exchange)


class Case:
    """A container, with or without an optimizer: a folder with what was converted before, and what
    readers see of the old and the new."""

    def __init__(self, folder: Path, container: str, training: bool) -> None:
        self.name = f"{container}, {'with' if training else 'without'} an optimizer"
        self.folder, self.trial = folder, folder / "trial"
        torch = container in ("safetensors", "pt")
        first = make_source(folder / "one.safetensors", 1.0, 5, "relu", training)
        second = make_source(folder / "two.safetensors", 2.0, 9, "tanh", training)
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


def crashes(case: Case, most: int, rng: random.Random) -> Counter[str]:
    """A crash after each call that changes the disk, or after `most` of them: the last ones, which
    are those of the commit, and some before."""
    read, write = os.pipe()

    def counted() -> None:
        count = [0]
        hook(count, -1)
        run(case.source, case.target)
        os.write(write, b"%d" % count[0])

    case.fresh()
    assert in_child(counted) == 0
    points = list(range(1, int(os.read(read, 20)) + 1))
    if len(points) > most:
        before, after = points[: -most // 2], points[-most // 2 :]
        points = sorted(rng.sample(before, most - len(after))) + after
    found: Counter[str] = Counter()
    for point in points:
        case.fresh()

        def crash(point: int = point) -> None:
            hook([0], point)
            run(case.source, case.target)

        in_child(crash)
        found[case.verdict()] += 1
    return found


def kills(case: Case, times: int, rng: random.Random) -> Counter[str]:
    """SIGKILL at random times."""
    started = time.monotonic()
    case.fresh()
    assert in_child(lambda: run(case.source, case.target)) == 0
    took = time.monotonic() - started
    found: Counter[str] = Counter()
    for _ in range(times):
        case.fresh()
        pid = os.fork()
        if pid == 0:
            run(case.source, case.target)
            os._exit(0)
        time.sleep(rng.random() * 1.2 * took)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found[case.verdict()] += 1
    return found


def resumes(case: Case, times: int, rng: random.Random) -> Counter[str]:
    """Killed after some slab, then resumed: as good as never interrupted."""
    found: Counter[str] = Counter()
    if case.target.suffix == ".pt":  # is not resumed
        return found
    small = {"max_memory": 8_000_000, "workers": 2}
    for _ in range(times):
        case.fresh()
        left = rng.randint(1, 8)

        def killed(stage: str, done: int, total: int, left: list[int] = [left]) -> None:  # noqa: B006
            left[0] -= 1
            if not left[0]:
                os._exit(KILLED)

        in_child(lambda k=killed: run(case.source, case.target, progress=k, **small))  # type: ignore[misc]
        there = [f.kind for f in convert.clean(case.trial, dry_run=True)]
        code = in_child(lambda: run(case.source, case.target, resume=True, **small))
        found[f"{case.verdict()}, {'resumed' if 'resumable' in there else 'anew'}, {code}"] += 1
    return found


def interrupts(case: Case, times: int, rng: random.Random) -> Counter[str]:
    """Ctrl-C from the entry point on: exit code 130 within two seconds, and no traceback."""
    found: Counter[str] = Counter()
    command = "torch2flax" if case.source.suffix == ".safetensors" else "flax2torch"
    for _ in range(times):
        case.fresh()
        process = subprocess.Popen(
            [sys.executable, "-c", _READY, command, case.source, case.target, "--force"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.random() * 0.8)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, told = process.communicate()
        late = time.monotonic() - started > 2 and process.returncode == 130
        if process.returncode not in (0, 130) or "Traceback" in told or late:
            found[f"exit code {process.returncode}: {told[-200:]}{' late' * late}"] += 1
            continue
        kept = [p for p in case.trial.iterdir() if p.name.startswith(".")]
        unnamed = [p.name for p in kept if p.name not in told]
        found[f"left {unnamed}" if unnamed else f"{process.returncode}, {case.verdict()}"] += 1
    return found


_READY = (
    "import signal; signal.signal(2, signal.default_int_handler)\n"  # if not in the background
    "import convert.__main__ as m; print(flush=True); m.main()"
)


def flips(case: Case, times: int, rng: random.Random) -> Counter[str]:
    """One bit of any of its files."""
    found: Counter[str] = Counter()
    shutil.rmtree(case.trial, ignore_errors=True)
    shutil.copytree(case.folder / "new", case.trial)
    files = [f for f in case.trial.rglob("*") if f.is_file() and f.stat().st_size]
    for _ in range(times):
        file = rng.choice(files)
        data = file.read_bytes()
        rotten = bytearray(data)
        rotten[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(rotten)
        try:
            found["unnoticed" if convert.check(case.target).intact else "found"] += 1
        except ZooError:
            found["found"] += 1
        file.write_bytes(data)
    return found


TRIALS: dict[str, Callable[[Case, int, random.Random], Counter[str]]] = {
    "crashes": crashes,
    "kills": kills,
    "resumes": resumes,
    "interrupts": interrupts,
    "flips": flips,
}
GOOD = {"old", "new", "found", "new, resumed, 0", "new, anew, 0", "0, new", "130, old", "130, new"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, most in zip(TRIALS, (400, 200, 50, 200, 1000), strict=True):
        parser.add_argument(f"--{name}", type=int, default=most)
    parser.add_argument("--containers", default=",".join(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write docs/reliability.md")
    options = vars(parser.parse_args())
    rng = random.Random(options["seed"])
    slabs.COPIED = 4096  # a small checkpoint has many slabs
    if "pt" in options["containers"]:
        import torch  # noqa: F401 - once, and not in every child
    rows: list[tuple[str, str, int, str, bool]] = []
    with tempfile.TemporaryDirectory() as folder:
        for container in options["containers"].split(","):
            for training in (True, False):
                place = Path(folder) / f"{container}-{training}"
                place.mkdir()
                case = Case(place, container, training)
                for name, trial in TRIALS.items():
                    if options[name]:
                        found = trial(case, options[name], rng)
                        told = "; ".join(f"{n} {what}" for what, n in sorted(found.items()))
                        if not found:
                            continue
                        good = found.keys() <= GOOD
                        rows.append((case.name, name, found.total(), told, good))
    show(rows)
    if options["write"]:
        write_section("Crashes, kills, resumes, interrupts, rot", page(rows))
    return 0 if all(row[-1] for row in rows) else 1


def show(rows: list[tuple[str, str, int, str, bool]]) -> None:
    """The table on the terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("checkpoint", "trial", "times", "found", ""):
        table.add_column(column)
    for what, trial, times, told, good in rows:
        table.add_row(what, trial, str(times), told, "ok" if good else "NOT AS IT SHOULD BE")
    Console(highlight=False, width=160 if not sys.stdout.isatty() else None).print(table)


def page(rows: list[tuple[str, str, int, str, bool]]) -> str:
    """The section of docs/reliability.md."""
    lines = [f"| {what} | {trial} | {times} | {told} |" for what, trial, times, told, _ in rows]
    return _PAGE + "\n".join(lines) + "\n"


_PAGE = """\
Written by `scripts/torture --write`. Each trial replaces a checkpoint by another whose weights,
config and optimizer differ. "old" and "new" are a checkpoint that is wholly the one or the other.

- *crashes*: the process ends after one of its calls that change the disk (write, fsync, rename,
  unlink, ...); at most so many of them, those of the commit among them.
- *kills*: SIGKILL at a random time.
- *resumes*: killed after a slab, then the same with `--resume`.
- *interrupts*: Ctrl-C from the entry point on, which has to give exit code 130 within two seconds,
  no traceback, and nothing left but what it names.
- *flips*: one bit of any of its files, then `check`.

| checkpoint | trial | times | found |
|---|---|---:|---|
"""

if __name__ == "__main__":
    sys.exit(main())
