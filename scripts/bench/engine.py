"""The engine against a plain copy: every kind of conversion, `check`, `inspect` and loading; with
--growth what conversions of 1, 2, 4 and 8 GB take instead.

Every job is a process of its own, run in turn with what it is held against: `cp` and `sync` of the
same bytes for a conversion, the libraries' own way for the others. Only the ratio within a round
counts, since disks and neighbours vary. With --write it writes docs/performance.json, from which
scripts/bench/performance_page.py makes docs/performance.md and its plot.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from bench import growth, snippets  # noqa: E402
from bench.checkpoints import make, make_many  # noqa: E402

_MEASURE = """
import resource, subprocess, sys, time
started = time.perf_counter()
done = subprocess.run(sys.argv[1:], capture_output=True)
seconds = time.perf_counter() - started
sys.stderr.buffer.write(done.stderr)
print(seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, done.returncode)
sys.stdout.buffer.write(done.stdout)
"""


@dataclass(frozen=True)
class Job:
    """Something to measure; `reference` is what it is held against, None for a copy."""

    label: str
    command: list[str]
    target: float | None  # the ratio that is asked for
    memory: float | None  # MB above an idle interpreter
    source: Path
    reference: list[str] | None = None
    inside: bool = False  # both say themselves how long they took, imports aside


_WARM = """
import numpy
free = 1024 * int(open("/proc/meminfo").read().split("MemFree:")[1].split()[0])
numpy.empty(max(0, min(6 << 30, free - (512 << 20))), numpy.uint8)[::4096] = 1
"""


def run(command: list[str], tree: Path) -> tuple[float, float, str]:
    """Seconds, MB at the peak, and what it printed. Everything written before is on the disk.

    Free memory is touched first: that of a virtual machine may have been given back to its host,
    and then the first who writes to it waits up to ten times as long, whoever it is.
    """
    os.sync()
    if Path("/proc/meminfo").is_file():
        subprocess.run([sys.executable, "-c", _WARM], check=True)
    environment = dict(os.environ, PYTHONPATH=str(tree), OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *command], capture_output=True, text=True, env=environment
    )
    first, _, rest = done.stdout.partition("\n")
    seconds, peak, code = first.split()
    if code != "0":
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return float(seconds), int(peak) / 1e3, rest


def copy(source: Path, folder: Path) -> list[str]:
    """Copy a checkpoint, and have it on the disk."""
    script = f"cp -r {source} {folder}/copied && find {folder}/copied -type f -exec sync {{}} +"
    return ["sh", "-c", script]


def clean(folder: Path) -> None:
    """Empty what a job wrote, and set it aside. Were it removed, whoever makes many files next
    would pay: ext4 tries every inode that was deleted in the last minutes before it takes another.
    """
    written = [*folder.glob("out*"), *folder.glob("copied*")]
    aside = Path(tempfile.mkdtemp(prefix="emptied", dir=folder))
    for path in written:
        for file in [path, *path.rglob("*")]:
            if file.is_file():
                os.truncate(file, 0)
        path.rename(aside / path.name)


def conversions(name: str, folder: Path, shrink: int) -> Iterator[Job]:
    """Both directions of one checkpoint, unverified and verified; other forms are made first."""
    path, options = make(folder, name, shrink)
    python = [sys.executable, "-m", "convert"]
    forms = {
        "msgpack": folder / f"{name}.msgpack",
        "safetensors": folder / f"{name}.flax.safetensors",
    }
    forms["orbax"] = folder / f"{name}.flax"
    for to, target in forms.items():
        run([*python, "torch2flax", str(path), str(target), "--to", to, *options], ROOT)
    large = 3.0 if name == "single" else 1.5
    for to, target in forms.items():
        for verify in (False, True):
            asked = 3.0 if to == "orbax" else 2.5 if verify else large
            told = "verified" if verify else "unverified"
            more = [] if verify else ["--no-verify"]
            memory = 256 if to == "orbax" else 160
            out = folder / f"out{target.suffix}"
            called = "Flax's safetensors" if to == "safetensors" else to
            forth = [*python, "torch2flax", str(path), str(out), "--to", to, *more, *options]
            yield Job(f"{name}: safetensors to {called}, {told}", forth, asked, memory, path)
            back = [*python, "flax2torch", str(target), f"{folder}/out.safetensors", *more]
            yield Job(f"{name}: {called} to safetensors, {told}", back, asked, memory, target)
    if name == "bert":
        yield from others(folder, path, forms)


def others(folder: Path, path: Path, forms: dict[str, Path]) -> Iterator[Job]:
    """What is measured on BERT-large alone."""
    python = [sys.executable, "-W", "ignore", "-c"]
    cli = [sys.executable, "-m", "convert"]
    pickled = folder / "bert.pt"
    run([*cli, "flax2torch", str(forms["msgpack"]), str(pickled)], ROOT)
    for to, out in (("safetensors", "out.safetensors"), ("msgpack", "out.msgpack")):
        command = [*cli, "torch2flax", str(pickled), f"{folder}/{out}", "--to", to, "--no-verify"]
        yield Job(f"bert: .pt to {to}, unverified", command, 1.7, 160, pickled)

    def inside(label: str, ours: str, theirs: str, target: float | None, at: Path) -> Job:
        scripts = [snippets.TIMED.format(**snippets.SNIPPETS[name]) for name in (ours, theirs)]
        commands = [[*python, script, str(at), str(folder / "out")] for script in scripts]
        return Job(label, commands[0], target, None, at, commands[1], inside=True)

    yield inside("bert: check, against a cold read", "check", "cold read", 1.2, forms["msgpack"])
    yield inside("bert: load torch, against load_file", "load torch", "load_file", 0.7, path)
    yield inside("bert: load torch, against a read", "load torch", "read torch", 1.5, path)
    yield inside("bert: load flax, against by hand", "load flax", "by hand flax", 1.0, path)
    yield inside(
        "bert: load flax onto 8 devices, against by hand", "load shards", "by hand shards", 1, path
    )
    yield inside("bert: to Orbax, against its save", "write orbax", "orbax save", 0.5, path)
    yield inside(
        "bert: from Orbax, against its restore", "read orbax", "orbax restore", 1.0, forms["orbax"]
    )


def inspections(folder: Path) -> Iterator[Job]:
    """What is asked for in seconds: the ratio to one second."""
    path = make_many(folder / "many")
    command = [sys.executable, "-m", "convert", "inspect", str(path)]
    label = "many: inspect, 1,000 shards, 100,000 tensors, seconds"
    yield Job(label, command, 2.0, 256, path, ["sleep", "1"])


def measure(job: Job, folder: Path, tree: Path, idle: float) -> tuple[float, float, float]:
    """The ratio, the seconds and the peak of one round."""
    clean(folder)
    other, _, told = run(job.reference or copy(job.source, folder), tree)
    other = float(told.split()[-2]) if job.inside else other
    clean(folder)
    seconds, peak, told = run(job.command, tree)
    if job.inside:
        seconds, grown = float(told.split()[-2]), float(told.split()[-1])
    clean(folder)
    return seconds / other, seconds, grown if job.inside else peak - idle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="jobs whose label has this")
    parser.add_argument("--checkpoints", default="bert,decoder,single,many")
    parser.add_argument("--shrink", type=int, default=1, help="fewer layers of the decoder")
    parser.add_argument("--tree", type=Path, default=ROOT, help="another version's source tree")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--machine", default="", help="a remark on where it was measured")
    parser.add_argument("--growth", action="store_true", help="1, 2, 4 and 8 GB instead")
    given = parser.parse_args()
    file = ROOT / "docs" / "performance.json"
    if given.growth:
        points = growth.grow(run, copy, clean, given.rounds, given.shrink, given.folder, given.tree)
        if given.write:
            growth.write(points, given.rounds, given.machine, file)
        return
    for name in given.checkpoints.split(","):
        found = bench(name, given)
        if given.write:
            told = json.loads(file.read_text()) if file.is_file() else {"jobs": {}}
            told["machine"] = given.machine
            told["jobs"] |= found
            file.write_text(json.dumps(told, indent=1) + "\n")


def bench(name: str, given: argparse.Namespace) -> dict[str, dict[str, object]]:
    """What is measured on one checkpoint: each job in each round, in turn with what it is held
    against."""
    idle = run([sys.executable, "-c", "pass"], given.tree)[1]
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        every = inspections(folder) if name == "many" else conversions(name, folder, given.shrink)
        jobs = [j for j in every if given.only in j.label]
        rows: dict[str, list[tuple[float, float, float]]] = {j.label: [] for j in jobs}
        for _ in range(given.rounds):
            for job in jobs:
                rows[job.label].append(measure(job, folder, given.tree, idle))
                print(f"  {job.label}: {rows[job.label][-1][0]:.2f}", flush=True)
    finally:
        shutil.rmtree(folder)
    found: dict[str, dict[str, object]] = {}
    for job in jobs:
        ratios = sorted(r for r, _, _ in rows[job.label])
        peak = max(p for _, _, p in rows[job.label])
        found[job.label] = {
            "ratios": ratios,
            "seconds": statistics.median(s for _, s, _ in rows[job.label]),
            "peak": peak,
            "measured": datetime.date.today().isoformat(),
            "warm": True,  # see `run`
            "target": job.target,
            "memory": job.memory,
        }
        print(
            f"{job.label:44} {ratios[0]:5.2f} {statistics.median(ratios):5.2f} {ratios[-1]:5.2f}  "
            f"asked {job.target}  peak {peak:.0f} MB",
            flush=True,
        )
    return found


if __name__ == "__main__":
    main()
