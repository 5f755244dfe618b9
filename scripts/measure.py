"""Measure every preset: PyTorch twin against Flax twin, on name-seeded weights.

Writes docs/measured.json, from which scripts/docs.py makes the table of models. One process a
preset, so that the large ones do not share memory. Arguments are names of presets; none means all.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "docs" / "measured.json"


def measure(name: str) -> dict[str, object]:
    """The worst output or intermediate of one preset, and where it was measured."""
    from convert.compare.outputs import compare_outputs
    from zoo import probe
    from zoo.registry import get

    found = get(name)
    started = time.perf_counter()
    weights = probe.weights(found.model.layout_of(found.config).shapes("torch"))
    sides = ("torch", weights), ("flax", weights)
    rows = compare_outputs(found.model, found.config, *sides)
    worst = max(rows, key=lambda r: r.ratio)
    return {
        "outputs": len(rows),
        "same": all(r.same for r in rows),
        "worst": worst.name,
        "error": worst.error / worst.scale,
        "noise": worst.noise / worst.scale,
        "ratio": worst.ratio,
        "error64": max(r.error64 / r.scale for r in rows),
        "seconds": round(time.perf_counter() - started, 1),
        "machine": platform.machine(),
    }


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--one":
        print(json.dumps(measure(sys.argv[2])))
        return
    from zoo.registry import names

    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results = {n: r for n, r in results.items() if n in names()}
    env = os.environ | {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    for name in sys.argv[1:] or names():
        command = [sys.executable, __file__, "--one", name]
        run = subprocess.run(command, capture_output=True, text=True, env=env)
        if run.returncode:
            sys.exit(f"{name}:\n{run.stderr}")
        results[name] = json.loads(run.stdout)
        print(name, results[name], flush=True)
        RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
