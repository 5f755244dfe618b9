"""What conversions of 1 to 8 GB take, seconds and memory, beside a copy of the same bytes."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.checkpoints import make_decoder

LAYERS = (2, 4, 9, 19)  # of the decoder: 1.1, 1.9, 3.9 and 8.0 GB
JOBS = {
    "to msgpack, unverified": ("msgpack", ["--no-verify"]),
    "to msgpack, verified": ("msgpack", []),
    "to Orbax, verified": ("orbax", []),
}
Run = Callable[[list[str], Path], tuple[float, float, str]]


def grow(
    run: Run,
    copy: Callable[[Path, Path], list[str]],
    clean: Callable[[Path], None],
    rounds: int,
    shrink: int,
    where: Path | None,
    tree: Path,
) -> list[dict[str, Any]]:
    """A point for each job and size: GB, median seconds and the highest peak in MB."""
    points: list[dict[str, Any]] = []
    idle = run([sys.executable, "-c", "pass"], tree)[1]
    for layers in (max(1, n // shrink) for n in LAYERS):
        folder = Path(tempfile.mkdtemp(dir=where))
        try:
            path, options = make_decoder(folder, layers)
            size = sum(f.stat().st_size for f in path.rglob("*")) / 1e9
            base = [sys.executable, "-m", "convert", "torch2flax", str(path)]
            commands = {
                label: [*base, str(folder / f"out.{to}"), "--to", to, *more, *options]
                for label, (to, more) in JOBS.items()
            }
            commands["cp and sync"] = copy(path, folder)
            took: dict[str, list[tuple[float, float]]] = {label: [] for label in commands}
            for _ in range(rounds):
                for label, command in commands.items():
                    seconds, peak, _ = run(command, tree)
                    took[label].append((seconds, peak - idle))
                    clean(folder)
                    print(f"  {size:.1f} GB, {label}: {seconds:.1f} s", flush=True)
        finally:
            shutil.rmtree(folder)
        points += [
            {
                "job": label,
                "gb": round(size, 2),
                "seconds": round(statistics.median(s for s, _ in found), 2),
                "peak": round(max(p for _, p in found)),
            }
            for label, found in took.items()
        ]
    return points


def write(points: list[dict[str, Any]], rounds: int, machine: str, file: Path) -> None:
    """Into the page's data, beside what else was measured."""
    told = json.loads(file.read_text()) if file.is_file() else {"jobs": {}}
    told["growth"] = {"rounds": rounds, "machine": machine, "points": points}
    file.write_text(json.dumps(told, indent=1) + "\n")
