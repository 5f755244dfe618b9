"""Runs every command on every hostile file of tests/hostile, each in a process of its own. Is it a
typed error, soon, in little memory, with nothing outside touched? Prints a table; with --write it
becomes part of docs/reliability.md.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import hostile  # noqa: E402 - tests/ is on the path from here on
from hostile.beside import TARGET  # noqa: E402
from reliability import section, write_section  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

SECONDS = 1.0  # of CPU, beyond what the command's imports take
MEMORY = 256 << 20  # bytes beyond what the interpreter held before
OUTPUT = 64 << 10  # bytes of text
HANGS = 20.0  # seconds after which a process is ended
READING = 0.2e-6  # of CPU, that a byte of it may take: JSON
REFUSED = frozenset({4, 5})
# What is not refused, as no tensor of it is wanted: `inspect` says in a line what it is.
PASSED = {
    ("pickle: a megabyte a million times", command): frozenset({0})
    for command in ("inspect", "inspect --json", "match", "lint")
}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
Command = Callable[[Path], list[object]]

# What is run of a case whose path is `p`.
COMMANDS: dict[str, Command] = {
    "inspect": lambda p: ["inspect", p],
    "inspect --json": lambda p: ["inspect", p, "--json"],
    "torch2flax": lambda p: ["torch2flax", p, p.parent / "out.msgpack"],
    "flax2torch": lambda p: ["flax2torch", p, p.parent / "out.safetensors"],
    "verify": lambda p: ["verify", p, p],
    "check": lambda p: ["check", p],
    "lint": lambda p: ["lint", p],
    "match": lambda p: ["match", p, p],
    "pack": lambda p: ["pack", p, "--name", "my_own", "--out", p.parent],
    "export": lambda p: ["export", p, p.parent / "out.onnx"],
}
_INTO: dict[str, Command] = {
    "torch2flax --force": lambda p: ["torch2flax", p, p.parent / TARGET, "--force"],
    "torch2flax --resume": lambda p: ["torch2flax", p, p.parent / TARGET, "--resume"],
    "inspect of the target": lambda p: ["inspect", p.parent / TARGET],
    "check of the target": lambda p: ["check", p.parent / TARGET],
    "clean": lambda p: ["clean", p.parent],
    "clean --dry-run": lambda p: ["clean", p.parent, "--dry-run"],
}
_NAMED: dict[str, Command] = {
    "models --weights": lambda p: ["models", "--weights"],
    "models --weights --json": lambda p: ["models", "--weights", "--json"],
    "inspect of the name": lambda p: ["inspect", "evil"],
    "torch2flax of the name": lambda p: ["torch2flax", "evil", p.parent / "out.msgpack"],
    "pack --card": lambda p: [
        *("pack", p, "--name", "my_own", "--out", p.parent, "--card", p.with_suffix(".json"))
    ],
}
_SOUND = {n: c for n, c in COMMANDS.items() if n not in ("match", "pack", "export")}
CLASSES: dict[str, dict[str, Command]] = {
    "certificate": _SOUND,  # what lies beside sound weights; the other commands do not look at it
    "optimizer": _SOUND,
    "journal": _INTO,
    "wheel": _NAMED,
}
FEW = ("inspect", "torch2flax", "torch2flax --resume", "clean", "models --weights")
FEW_OF = {"certificate": ("check",)}
# Where a command may do something else than refuse the file, which it does not need.
WEIGHTS = ("safetensors", "pt", "msgpack", "orbax", "onnx", "index")


def allowed(kind: str, command: str) -> frozenset[int]:
    """The exit codes of a command on a case of a class."""
    if kind in WEIGHTS:
        return frozenset({2, 5}) if command == "check" else REFUSED
    if kind in ("config", "label"):  # `inspect` says it in a notice; sizes that do not fit are 1, 2
        return frozenset({0, 1, 2, 4, 5})
    if kind == "certificate":
        return REFUSED | {2} if command == "check" else frozenset({0, 1, 2, 3})
    return frozenset({0, 1, 2, 3, 4, 5})


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    kind: str
    case: str
    command: str
    code: int
    seconds: float
    grown: int  # bytes
    wrong: tuple[str, ...]
    told: str


def forked(work: Callable[[], int], seconds: float) -> tuple[int, float, int, str]:
    """The exit status of a process of its own, its CPU seconds, by how many bytes it grew, and
    what it wrote; it is ended after so many seconds."""
    read, write = os.pipe()
    before = resident()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        for fd in (1, 2):
            os.dup2(write, fd)
        code = 99
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)
    os.close(write)
    told, end = bytearray(), time.monotonic() + seconds
    while time.monotonic() < end:
        if select.select([read], [], [], max(0.0, end - time.monotonic()))[0]:
            data = os.read(read, 1 << 16)
            if not data:
                break
            told += data[: max(0, (1 << 20) - len(told))]
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(read)
    _, status, used = os.wait4(pid, 0)
    grown = used.ru_maxrss * 1024 - before
    code = os.waitstatus_to_exitcode(status)
    return code, used.ru_utime + used.ru_stime, grown, told.decode(errors="replace")


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def run(arguments: list[object], folder: Path) -> int:
    """A command as the console script runs it; 98 where it touches what it should not."""
    from convert.cli import main

    touched: list[str] = []
    sys.addaudithook(lambda event, args: watch(event, args, folder, touched))
    sys.argv = ["zooconvert", *map(str, arguments)]
    if (folder / "site").is_dir():
        sys.path.insert(0, str(folder / "site"))
    try:
        main._run()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    if touched:
        print("TOUCHED", *touched[:3])
        return 98
    return code


def watch(event: str, args: tuple[Any, ...], folder: Path, touched: list[str]) -> None:
    """Note what a command does outside of its folder."""
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect"):
        touched.append(event)
    elif event == "import" and str(args[0]).startswith("evil"):
        touched.append(f"{event} {args[0]}")
    elif event == "open" and isinstance(args[0], str | bytes):
        path = os.path.realpath(os.path.join(os.getcwd(), os.fsdecode(args[0])))
        writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        within = path.startswith(f"{folder}/") or path == str(folder)
        if (
            "SECRET" in path
            or path == "/etc/passwd"
            or (writes and not within and path[:5] != "/dev/")
        ):
            touched.append(f"{event} {path}")
    elif event in (
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.mkdir",
        "shutil.rmtree",
        "os.truncate",
    ):
        for name in (a for a in args if isinstance(a, str | bytes)):
            path = os.path.abspath(os.fsdecode(name))
            if not path.startswith(f"{folder}/") and args[-1] in (-1, None):
                touched.append(f"{event} {path}")


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder, its size and the time of its last change."""
    found = {}
    for top, folders, files in os.walk(folder):
        for name in (*folders, *files):
            status = os.lstat(Path(top, name))
            found[str(Path(top, name))] = (status.st_size, status.st_mtime_ns)
    return found


def trial(kind: str, name: str, make: hostile.Make, command: str, argv: Command) -> Ran:
    """One command on one case."""
    outer = Path(tempfile.mkdtemp(prefix="hostile-")).resolve()
    try:
        (outer / "canary").write_text("alive")
        (outer / "precious").write_text("alive")
        folder = outer / "in"
        folder.mkdir()
        path = make(folder)
        resumable(folder, path)
        os.chdir(folder)
        before = listing(outer)
        size = sum(512 * p.lstat().st_blocks for p in folder.rglob("*"))
        code, seconds, grown, told = forked(lambda: run(argv(path), outer / "in"), HANGS)
        after = listing(outer)
        ours = (str(folder / n) for n in ("out.", TARGET, f".{TARGET}.", "zooconvert_weights"))
        mine = (*ours, str(path.parent / "out."), str(path.parent / "zooconvert_weights"))
        changed = [
            p for p in before.keys() | after.keys()
            if before.get(p) != after.get(p) and not p.startswith(mine) and Path(p) not in
            (folder, path.parent)
        ]  # fmt: skip
        wrong = list(judge(kind, name, command, code, seconds - size * READING, grown, told))
        wrong += [f"changed {p}" for p in changed]
        return Ran(kind, name, command, code, seconds, grown, tuple(wrong), told)
    finally:
        os.chdir(ROOT)
        shutil.rmtree(outer, ignore_errors=True)


def resumable(folder: Path, path: Path) -> None:
    """Fill in the record of the conversion that a case is of."""
    for record in folder.glob(".*/resume.json"):
        if record.read_bytes() == b"SAME":
            from convert.api import plan
            from convert.engine.resume import identity
            from zoo.checkpoint import hashes

            prepared = plan(path, folder / "x.msgpack", framework="flax")
            record.write_text(json.dumps(identity(prepared, hashes.best())))


def judge(
    kind: str, name: str, command: str, code: int, seconds: float, grown: int, told: str
) -> Iterator[str]:
    """What is not as it should be."""
    if code == 98:
        yield told[told.rfind("TOUCHED") :].strip()
    elif code not in allowed(kind, command) | PASSED.get((name, command), frozenset()):
        yield f"hangs or was ended by signal {-code}" if code < 0 else f"exit code {code}"
    if "Traceback" in told or "this is a bug" in told:
        yield "an error that is not ours"
    if seconds > SECONDS + IMPORTS.get(command, 0.5):
        yield f"{seconds:.1f} s"
    if grown > MEMORY:
        yield f"{grown >> 20} MB"
    if len(told) > OUTPUT and "--json" not in command:
        yield f"{len(told)} characters of output"
    if _CONTROL.search(told):
        yield "control characters in the output"


# What importing frameworks takes, where a command gets that far.
IMPORTS = {"export": 8.0, "verify": 1.0, "match": 8.0}


def preload() -> None:
    """Import what the commands need and is ours and without a framework, for each process."""
    import convert
    from zoo.checkpoint.certificate import versions
    from zoo.registry import families

    families()
    versions()  # asks `uname` once
    for module in pkgutil.walk_packages(convert.__path__, "convert."):
        if not (set(module.name.split(".")) & {"porting", "live", "__main__"}):
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)
    if "torch" in sys.modules or "jax" in sys.modules:
        raise AssertionError("a framework was imported")
    gc.collect()
    gc.freeze()  # a child shares what it does not touch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", help="only these, separated by commas")
    parser.add_argument("--cases", default="", help="only those whose name holds this")
    parser.add_argument("--few", action="store_true", help="a few of the commands")
    parser.add_argument("--every", type=int, default=1, help="only each so many-th of the cases")
    parser.add_argument("--verbose", action="store_true", help="show what each said")
    parser.add_argument("--write", action="store_true", help="into docs/reliability.md")
    options = parser.parse_args()
    preload()
    every = hostile.every()
    chosen = options.classes.split(",") if options.classes else list(every)
    ran: list[Ran] = []
    for kind in chosen:
        cases = [(n, make) for n, make in every[kind].items() if options.cases in n]
        for command, argv in CLASSES.get(kind, COMMANDS).items():
            if options.few and command not in FEW_OF.get(kind, FEW):
                continue
            for name, make in cases[:: options.every]:
                ran.append(trial(kind, name, make, command, argv))
                show(ran[-1], options.verbose)
    rows = [row(kind, len(every[kind]), [r for r in ran if r.kind == kind]) for kind in chosen]
    table = Table(*HEAD, box=None, pad_edge=False, header_style="bold")
    for told in rows:
        table.add_row(*told)
    Console(highlight=False, width=150 if not sys.stdout.isatty() else None).print(table)
    if options.write:
        write_section(TITLE, page(rows))
    return 1 if any(r.wrong for r in ran) else 0


def show(r: Ran, verbose: bool) -> None:
    """What is wrong, at once; with `verbose` all that was said."""
    if verbose:
        print(f"== {r.kind}: {r.case}: {r.command}: {r.code}\n{r.told[:1500]}")
    if r.wrong:
        last = r.told.strip()[-300:].replace("\n", " | ")
        print(f"{r.kind}: {r.case}: {r.command}: {'; '.join(r.wrong)}: {last!a}", flush=True)


TITLE = "Hostile files"
HEAD = (
    "class",
    "files",
    "runs",
    "exit codes",
    "CPU seconds, most",
    "MB, most",
    "not as it should be",
)


def row(kind: str, files: int, ran: list[Ran]) -> list[str]:
    """A class, in the table."""
    codes = Counter(r.code for r in ran)
    told = ", ".join(f"{n} x {code}" for code, n in sorted(codes.items()))
    slowest, largest = max(r.seconds for r in ran), max(r.grown for r in ran)
    wrong = sum(bool(r.wrong) for r in ran)
    return [
        *(kind, str(files), str(len(ran)), told),
        *(f"{slowest:.1f}", str(max(0, largest) >> 20), str(wrong)),
    ]


def page(rows: list[list[str]]) -> str:
    """The section of docs/reliability.md; classes that were not run keep their rows."""
    before = [x.split(" | ") for x in section(TITLE).splitlines() if x.startswith("| ")][2:]
    every = {cells[0].strip("| "): [c.strip("| ") for c in cells] for cells in before}
    every |= {cells[0]: cells for cells in rows}
    lines = [f"| {' | '.join(x)} |" for x in (list(HEAD), ["---"] * len(HEAD), *every.values())]
    return _PAGE + "\n".join(lines) + "\n"


_PAGE = f"""\
Written by `scripts/hostile --write`: every file of `tests/hostile` under every command that may
meet it, each run in a process of its own. Right is:

- a typed error, with exit code 4 or 5 wherever the command needs what is hostile; of configs,
  labels and what lies beside a checkpoint also 0 to 3, where it is passed over, told in a notice,
  or does not fit;
- within {SECONDS:.0f} s of CPU and {MEMORY >> 20} MB beyond start-up, and 0.2 s for each megabyte
  of the file;
- no traceback, no signal, at most {OUTPUT >> 10} kB of text, no control characters in it;
- no process started, no code of the file imported, nothing opened or changed outside of the file's
  folder and nothing in it but the target (by an audit hook, and by comparing the folders).

"""

if __name__ == "__main__":
    sys.exit(main())
