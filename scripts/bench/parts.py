"""Where a conversion's time goes: every thread's stack, sampled, in threads' seconds by part.

With --write it goes into docs/performance.json, from which performance_page.py makes a table.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from bench.checkpoints import make  # noqa: E402
from bench.engine import clean  # noqa: E402

EVERY_S = 0.005
_SAMPLED = """
import json, runpy, sys, threading, time, traceback
log, every = open(sys.argv.pop(1), "w"), float(sys.argv.pop(1))

def sample():
    while not done.wait(every):
        stacks = [traceback.extract_stack(f)[::-1] for t, f in sys._current_frames().items()
                  if t != threading.get_ident()]
        log.write(json.dumps([[f"{f.filename} in {f.name}" for f in s] for s in stacks]) + "\\n")

done = threading.Event()
sampler = threading.Thread(target=sample)
sampler.start()
try:
    runpy.run_module("convert", run_name="__main__", alter_sys=True)
finally:
    done.set()
    sampler.join()
    log.close()
"""
# The first whose pattern is found in a stack, innermost frame first.
PARTS = {
    "waiting": r"\A.*(/(threading|queue|selectors)\.py| in (_worker|_wait)$)",
    "transposition": r"/strided\.py",
    "hashes": r"/hashes\.py",
    "writing": r"in (put|_put|_copied|begin_writing|fsync|_sync|_create|_make)\b",
    "reading": r"in (fill|pread|_read_short|read|prefetch)\b",
    "start": r"<frozen importlib|in (identify\w*|readings|plan\w*|prepare)\b",
}
JOBS = {
    "bert to msgpack, unverified": ("bert", "msgpack", ["--no-verify"]),
    "bert to msgpack, verified": ("bert", "msgpack", []),
    "bert to Orbax, verified": ("bert", "orbax", []),
    "single to msgpack, unverified": ("single", "msgpack", ["--no-verify"]),
    "single to msgpack, verified": ("single", "msgpack", []),
}


def part(stack: str) -> str:
    return next((name for name, p in PARTS.items() if re.search(p, stack, re.M)), "the rest")


def sampled(command: list[str], folder: Path) -> tuple[float, Counter[str]]:
    """Seconds of the clock, and threads' seconds by part."""
    log = folder / "stacks"
    started = time.perf_counter()
    told = [sys.executable, "-c", _SAMPLED, str(log), str(EVERY_S), *command]
    subprocess.run(told, check=True, capture_output=True, cwd=ROOT)
    seconds = time.perf_counter() - started
    moments = [json.loads(line) for line in log.read_text().splitlines()]
    found: Counter[str] = Counter()
    for stacks in moments:
        found.update(part("\n".join(stack)) for stack in stacks)
    return seconds, Counter({p: n * seconds / len(moments) for p, n in found.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    told: dict[str, Any] = {}
    try:
        made = {name: make(folder, name) for name in ("bert", "single")}
        for label, (name, to, more) in JOBS.items():
            path, options = made[name]
            target = folder / f"out.{to}"
            rows = []
            for _ in range(given.rounds):
                command = ["torch2flax", str(path), str(target), "--to", to, *more, *options]
                rows.append(sampled(command, folder))
                clean(folder)
            told[label] = {"seconds": statistics.median(s for s, _ in rows)} | {
                p: statistics.median(found[p] for _, found in rows) for p in (*PARTS, "the rest")
            }
            print(label, {k: round(v, 2) for k, v in told[label].items()}, flush=True)
    finally:
        shutil.rmtree(folder)
    if given.write:
        file = ROOT / "docs" / "performance.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"parts": told}, indent=1) + "\n")


if __name__ == "__main__":
    main()
