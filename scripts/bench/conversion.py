"""Converting a checkpoint of BERT-large's size: ours, a plain copy, and the obvious script.

The obvious script loads with safetensors, transposes by hand, and saves with Orbax. Each runs in a
process of its own, in turn; wall time and peak memory of the process, and the ratios, are printed.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 3
TOOL = str(Path(sys.executable).with_name("zooconvert"))
OBVIOUS = """
import sys, jax
import orbax.checkpoint as ocp
from safetensors.numpy import load_file
tree = {}
for name, value in load_file(sys.argv[1]).items():
    *path, leaf = name.split(".")
    if leaf == "weight":
        matrix = "embedding" if "embeddings." in name else "kernel"
        leaf = matrix if value.ndim == 2 else "scale"
    node = tree
    for part in path:
        node = node.setdefault(part, {})
    node[leaf] = value.T if leaf == "kernel" else value
checkpointer = ocp.StandardCheckpointer()
checkpointer.save(sys.argv[2], jax.tree.map(jax.numpy.asarray, tree))
checkpointer.wait_until_finished()
"""


def make(path: Path) -> None:
    """BERT-large with name-seeded weights."""
    from zoo import probe
    from zoo.containers.base import TensorInfo
    from zoo.containers.safetensors_file import SafetensorsWriter
    from zoo.registry import get

    found = get("bert_large_uncased")
    shapes = found.model.layout_of(found.config).shapes("torch")
    header = {n: TensorInfo("F32", s) for n, s in shapes.items()}
    with SafetensorsWriter(path, header, {"format": "pt"}) as writer:
        for name, shape in shapes.items():
            writer.write(name, probe.weight(name, shape))
        writer.finish()


def run(command: list[str]) -> tuple[float, float]:
    """Seconds of wall time, and GB of peak memory of the process."""
    measured = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, "
        "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    started = time.perf_counter()
    out = subprocess.run(
        [sys.executable, "-c", measured, *command], check=True, capture_output=True, text=True
    )
    return time.perf_counter() - started, int(out.stdout) * 1024 / 1e9


def main() -> None:
    folder = Path(tempfile.mkdtemp(dir=sys.argv[1] if len(sys.argv) > 1 else None))
    source = folder / "model.safetensors"
    make(source)
    size = source.stat().st_size / 1e9
    jobs = {
        "plain copy and sync": ["sh", "-c", f"cp {source} {folder}/x && sync {folder}/x"],
        "zooconvert, verified, to orbax": [TOOL, "torch2flax", str(source), f"{folder}/x"],
        "zooconvert --no-verify, to orbax": [
            *(TOOL, "torch2flax", str(source), f"{folder}/x", "--no-verify"),
        ],
        "zooconvert, verified, to msgpack": [
            *(TOOL, "torch2flax", str(source), f"{folder}/x", "--to", "msgpack"),
        ],
        "safetensors + transpose + Orbax": [
            *(sys.executable, "-c", OBVIOUS, str(source), f"{folder}/x"),
        ],
    }
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    try:
        for _ in range(ROUNDS):
            for name, command in jobs.items():
                results[name].append(run(command))
                for left in folder.glob("x*"):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
    finally:
        shutil.rmtree(folder)
    reference = results["safetensors + transpose + Orbax"]
    print(f"{size:.2f} GB, median of {ROUNDS}, in turn")
    for name, rows in results.items():
        seconds = statistics.median(s for s, _ in rows)
        memory = max(m for _, m in rows)
        ratio = statistics.median(r[0] / s[0] for s, r in zip(rows, reference, strict=True))
        print(f"{name:34} {seconds:6.1f} s  {memory:5.2f} GB peak  {ratio:5.1f} times as fast")


if __name__ == "__main__":
    main()
