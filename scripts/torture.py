"""What befalls a conversion: crashes after each call that changes the disk, kills, power cuts,
disks that fail, interrupted runs that are resumed, Ctrl-C, rot. Prints a table, and with --write
puts its rows into docs/reliability.md.

Every trial replaces a checkpoint by another whose weights, config and optimizer all differ, and
then asks what readers see: the old one whole, the new one whole, or something that never was.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import pickle
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

from disk_model import Recorder, left, write
from reliability import section, write_section
from rich.console import Console
from rich.table import Table
from torture_case import HOOKED, KILLED, TARGETS, Case, hook, in_child, run
from torture_libraries import LIBRARIES

import convert
from convert.engine import commit as commit_module
from zoo.checkpoint import slabs
from zoo.containers.errors import ZooError

TITLE = "Crashes, kills, power cuts, failing disks, resumes, interrupts, rot"
Row = tuple[
    str, str, int, str, bool
]  # checkpoint, trial, times, what was found, whether it is right


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


def power(case: Case, times: int, rng: random.Random) -> Counter[str]:
    """The power is cut: what was not synced is there in parts, or not at all. Once a conversion has
    said that it is done, only the new one will do; and the next conversion finds its way."""
    file = case.folder / "disk.pickle"

    def recorded() -> None:
        recorder = Recorder(case.trial)
        commit_module._exchange = recorder.hook(HOOKED)(commit_module._exchange)
        run(case.source, case.target)
        recorder.look()
        file.write_bytes(pickle.dumps(recorder.disk))

    case.fresh()
    assert in_child(recorded) == 0
    disk = pickle.loads(file.read_bytes())
    found: Counter[str] = Counter()
    for i in range(times):
        end = disk.moments
        moment = (end, rng.randint(max(1, end - 60), end), rng.randint(1, end))[i % 3]
        shutil.rmtree(case.trial)
        write(left(disk, moment, rng), case.trial)
        verdict = case.verdict()
        if verdict == "old" and moment == end:
            verdict = "old, after it was done"
        if verdict in ("old", "new") and i % 4 == 0:
            code = in_child(lambda: run(case.source, case.target))
            verdict = verdict if code == 0 and case.is_new() else f"{verdict}, and stuck"
        found[verdict] += 1
    return found


def faults(case: Case, times: int, rng: random.Random) -> Counter[str]:
    """One call fails, or all from it on: an error that names the file, and what was there is there
    still; or it is done."""
    read, write_end = os.pipe()

    def counted() -> None:
        calls = failing(-1, errno.EIO, lasting=False)
        run(case.source, case.target)
        os.write(write_end, b"%d" % calls[0])

    case.fresh()
    assert in_child(counted) == 0
    calls = int(os.read(read, 20))
    found: Counter[str] = Counter()
    for _ in range(times):
        case.fresh()
        at, number = rng.randint(1, calls), rng.choice((errno.EIO, errno.ENOSPC, errno.EDQUOT))
        lasting = rng.random() < 0.5

        def tried(at: int = at, number: int = number, lasting: bool = lasting) -> None:
            failing(at, number, lasting)
            try:
                run(case.source, case.target)
            except (ZooError, OSError) as e:  # of a source that is not open yet
                files = str(case.target), str(case.source)
                named = any(f in str(e) for f in files) and ".zooconvert-" not in str(e)
                os._exit(REFUSED if named else UNNAMED)

        code = in_child(tried)
        told = {0: "done", REFUSED: "refused"}.get(code, f"exit code {code}, call {at}, {number}")
        found[f"{case.verdict()}, {told}"] += 1
    return found


REFUSED, UNNAMED = 3, 4


def failing(last: int, number: int, lasting: bool) -> list[int]:
    """Have the call of this number fail, and if it lasts all after it; the calls so far. A full
    disk lets files be removed, and read."""
    calls = [0]

    def wrapped(real: Callable[..., Any], frees: bool, counts: Callable[..., bool]) -> Any:
        def call(*args: Any, **kw: Any) -> Any:
            if counts(*args, **kw):
                calls[0] += 1
                due = calls[0] == last or (lasting and 0 < last < calls[0])
                if due and (number == errno.EIO or not frees):
                    raise OSError(number, os.strerror(number))
            return real(*args, **kw)

        return call

    for name in (*HOOKED, "preadv", "copy_file_range"):
        frees = name in ("unlink", "rmdir", "preadv")
        setattr(os, name, wrapped(getattr(os, name), frees, lambda *a, **kw: True))
    creates = os.O_CREAT | os.O_WRONLY | os.O_RDWR
    os.open = wrapped(os.open, False, lambda path, flags, *a, **kw: bool(flags & creates))
    # pathlib's files; not what is only read
    io.open = wrapped(io.open, False, lambda f, mode="r", *a, **kw: mode[0] in "wxa")
    return calls


def resumes(case: Case, times: int, rng: random.Random) -> Counter[str]:
    """Killed after some slab, then resumed: byte for byte as if never interrupted."""
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
        told = case.verdict() if case.is_new() else "other bytes"
        found[f"{told}, {'resumed' if 'resumable' in there else 'anew'}, {code}"] += 1
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


TRIALS: dict[str, tuple[Callable[[Case, int, random.Random], Counter[str]], int]] = {
    "crashes": (crashes, 400),
    "kills": (kills, 100),
    "power cuts": (power, 40),
    "disk faults": (faults, 30),
    "resumes": (resumes, 10),
    "interrupts": (interrupts, 20),
    "flips": (flips, 500),
}
GOOD = {
    *("old", "new", "found"),
    *("old, refused", "new, refused", "new, done"),
    *("new, resumed, 0", "new, anew, 0"),
    *("0, new", "130, old", "130, new"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, (_, most) in TRIALS.items():
        told = "of each checkpoint, with and without an optimizer"
        parser.add_argument(f"--{name.replace(' ', '-')}", type=int, default=most, help=told)
    parser.add_argument("--libraries", type=int, default=200, help="kills of what libraries write")
    parser.add_argument("--containers", default=",".join(TARGETS))
    parser.add_argument("--layers", type=int, help="of the checkpoints; None: for 400 crashes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="into docs/reliability.md")
    options = vars(parser.parse_args())
    rng = random.Random(options["seed"])
    slabs.COPIED = 4096  # a small checkpoint has many slabs
    containers = [c for c in options["containers"].split(",") if c]
    if "pt" in containers:
        import torch  # noqa: F401 - once, and not in every child
    rows: list[Row] = []

    def note(what: str, trial: str, found: Counter[str], good: bool) -> None:
        if found:
            told = "; ".join(f"{n} {told}" for told, n in sorted(found.items()))
            rows.append((what, trial, found.total(), told, good))
            if options["write"]:
                record(rows[-1:])

    with tempfile.TemporaryDirectory() as folder:
        # First: Orbax does not let a process fork that has read with it.
        for library, kill in LIBRARIES.items() if options["libraries"] else ():
            place = Path(folder) / f"of-{library.split()[0]}"
            note(library, "kills", kill(place, options["libraries"], rng), good=True)
        for container in containers:
            for training in (True, False):
                place = Path(folder) / f"{container}-{training}"
                place.mkdir()
                case = Case(place, container, training, options["layers"])
                for name, (trial, _) in TRIALS.items():
                    if times := options[name.replace(" ", "_")]:
                        found = trial(case, times, rng)
                        note(case.name, name, found, found.keys() <= GOOD)
    show(rows)
    return 0 if all(row[-1] for row in rows) else 1


def show(rows: list[Row]) -> None:
    """The table on the terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("checkpoint", "trial", "times", "found", ""):
        table.add_column(column)
    for what, trial, times, told, good in rows:
        table.add_row(what, trial, str(times), told, "ok" if good else "NOT AS IT SHOULD BE")
    Console(highlight=False, width=160 if not sys.stdout.isatty() else None).print(table)


def record(rows: list[Row]) -> None:
    """Rows of docs/reliability.md, in place of those of the same trials."""
    lines = [line for line in section(TITLE).splitlines() if line.startswith("| ")]
    kept = {tuple(line.split(" | ")[:2]): line for line in lines if "| checkpoint" not in line}
    for what, trial, times, told, _ in rows:
        kept[f"| {what}", trial] = f"| {what} | {trial} | {times} | {told} |"
    write_section(TITLE, _PAGE + "\n".join(kept.values()))


_PAGE = """\
Written by `scripts/torture --write`. Each trial replaces a checkpoint by another whose weights,
config and optimizer differ. "old" and "new" are a checkpoint that is wholly the one or the other.

- *crashes*: the process ends after one of its calls that change the disk (write, fsync, rename,
  unlink, ...), or in the middle of a write; at most so many of them, those of the commit among
  them.
- *kills*: SIGKILL at a random time. The last rows are what libraries write over a file of their
  own, killed likewise.
- *power cuts*: a run is recorded, and then what a disk may be left with is built: of what was not
  synced, any of a file's blocks, and the first changes of names or any of them. Once the conversion
  is done, only "new" counts; after every fourth the next conversion has to succeed.
- *disk faults*: a call fails with EIO, ENOSPC or EDQUOT, or all from it on: an error that names the
  source or the target ("refused"), or it is done all the same.
- *resumes*: killed after a slab, then the same with `--resume`: every byte as if nothing had been.
- *interrupts*: Ctrl-C from the entry point on, which has to give exit code 130 within two seconds,
  no traceback, and nothing left but what it names.
- *flips*: one bit of any of its files, then `check`.

| checkpoint | trial | times | found |
|---|---|---:|---|
"""

if __name__ == "__main__":
    sys.exit(main())
