"""What we read and write by hand beside the library that does the same: seconds and peak memory.

Each job runs in a process of its own, ours and the library's in turn; the imports that a job needs
count, and so does syncing what was written. Prints the table of docs/architecture.md.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROUNDS = 5
_MAKE = """
import numpy as np
rng = np.random.default_rng(0)
arrays = {f"layers.{i}.weight": rng.standard_normal((1024, 1024), np.float32) for i in range(N)}
"""
_OURS_WRITE = """
from zoo.containers.base import TensorInfo
header = {n: TensorInfo("F32", a.shape) for n, a in arrays.items()}
with Writer(Path(sys.argv[1]), header, {}) as w:
    for name, a in arrays.items():
        w.write(name, a)
    w.finish()
"""
_OURS_READ = """
from zoo.containers import open_checkpoint
with open_checkpoint(Path(sys.argv[1])) as r:
    total = sum(float(r.read(n)[0, 0]) for n in r.tensors)
"""
_SYNC = "fd = os.open(sys.argv[1], os.O_RDONLY); os.fsync(fd); os.close(fd)"
_TREE = "{n.rpartition('.')[0]: {'weight': a} for n, a in arrays.items()}"

# container, library -> code that writes `arrays` to sys.argv[1], code that reads them from there
JOBS: dict[tuple[str, str], tuple[str, str]] = {
    ("safetensors", "ours"): (
        "from zoo.containers.safetensors_file import SafetensorsWriter as Writer\n" + _OURS_WRITE,
        _OURS_READ,
    ),
    ("safetensors", "safetensors"): (
        f"from safetensors.numpy import save_file\nsave_file(arrays, sys.argv[1])\n{_SYNC}",
        "from safetensors.numpy import load_file\n"
        "total = sum(float(a[0, 0]) for a in load_file(sys.argv[1]).values())",
    ),
    ("Flax msgpack", "ours"): (
        "from zoo.containers.flax_msgpack import MsgpackWriter as Writer\n" + _OURS_WRITE,
        _OURS_READ,
    ),
    ("Flax msgpack", "flax.serialization"): (
        "from flax import serialization\n"
        f"open(sys.argv[1], 'wb').write(serialization.to_bytes({_TREE}))\n{_SYNC}",
        "from flax import serialization\n"
        "tree = serialization.msgpack_restore(open(sys.argv[1], 'rb').read())\n"
        "total = sum(float(leaf['weight'][0, 0]) for leaf in tree.values())"
        " if 'layers' not in tree else"
        " sum(float(leaf['weight'][0, 0]) for leaf in tree['layers'].values())",
    ),
    ("PyTorch file, read", "ours"): ("", _OURS_READ),
    ("PyTorch file, read", "torch.load"): (
        "import torch\ntorch.save({n: torch.from_numpy(a) for n, a in arrays.items()},"
        f" sys.argv[1])\n{_SYNC}",
        "import torch\nread = torch.load(sys.argv[1], weights_only=True)\n"
        "total = sum(float(t[0, 0]) for t in read.values())",
    ),
    ("Orbax", "ours"): (
        "from zoo.containers.orbax_dir import OrbaxWriter as Writer\n" + _OURS_WRITE,
        _OURS_READ,
    ),
    ("Orbax", "orbax-checkpoint"): (
        "import orbax.checkpoint as ocp\nc = ocp.StandardCheckpointer()\n"
        f"c.save(sys.argv[1], {_TREE})\nc.wait_until_finished()",
        "import jax, orbax.checkpoint as ocp\n"
        "tree = ocp.PyTreeCheckpointer().restore(sys.argv[1])\n"
        "total = sum(float(x[0, 0]) for x in jax.tree.leaves(tree))",
    ),
}
_MEASURE = """
import os, resource, sys, time
from pathlib import Path
{setup}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
{job}
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(seconds, peak)
"""


def measure(setup: str, job: str, path: Path) -> tuple[float, float]:
    """Seconds, and MB of peak memory beyond what the process held before."""
    code = _MEASURE.format(setup=setup, job=job)
    run = [sys.executable, "-W", "ignore", "-c", code, str(path)]
    out = subprocess.run(run, check=True, capture_output=True, text=True).stdout.split()
    return float(out[-2]), int(out[-1]) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensors", type=int, default=100, help="of 4 MiB each")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    make = f"N = {given.tensors}\n{_MAKE}"
    found: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    folder = Path(tempfile.mkdtemp())
    try:
        for _ in range(given.rounds):
            for (container, library), (write, read) in JOBS.items():
                path = folder / container.replace(" ", "_").replace(",", "")
                if write:
                    shutil.rmtree(path, ignore_errors=True)
                    path.unlink(missing_ok=True)
                    key = (container, library, "write")
                    found.setdefault(key, []).append(measure(make, write, path))
                elif not path.exists():
                    measure(make, JOBS[container, "torch.load"][0], path)
                found.setdefault((container, library, "read"), []).append(measure("", read, path))
    finally:
        shutil.rmtree(folder)
    print(f"{given.tensors * 4} MiB, medians of {given.rounds} rounds, in turn")
    print("| container | job | library | ours | library | ratio | ours, peak | library, peak |")
    print("|---|---|---|---|---|---|---|---|")
    for container, library in JOBS:
        for job in ("write", "read"):
            ours, theirs = (found.get((container, who, job)) for who in ("ours", library))
            if library == "ours" or not ours or not theirs:
                continue
            a, b = (statistics.median(s for s, _ in rows) for rows in (ours, theirs))
            ratio = statistics.median(x[0] / y[0] for x, y in zip(ours, theirs, strict=True))
            peaks = [statistics.median(m for _, m in rows) for rows in (ours, theirs)]
            print(
                f"| {container} | {job} | {library} | {a:.2f} s | {b:.2f} s | {ratio:.2f} "
                f"| {peaks[0]:.0f} MB | {peaks[1]:.0f} MB |"
            )


if __name__ == "__main__":
    main()
