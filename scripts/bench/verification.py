"""`verify --level outputs` on MiniLM, beside running both models once in float32 and in float64.

Each in fresh processes, in turn; medians. The plain runs load both checkpoints with `zoo.load` in
either precision and call each model once, Flax's under jit, as one must to run them at all. Counted
twice: the whole process, and without the import of the frameworks, which is the larger part of
both. Writes docs/verification.json. The argument is the directory of MiniLM: model.safetensors and
config.json.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 5
RESULTS = Path(__file__).parents[2] / "docs" / "verification.json"
PLAIN = """
import sys, time
import flax.nnx as nnx, jax, torch
import zoo.loading.into_flax, zoo.loading.into_torch
import zoo.models.bert.model_flax, zoo.models.bert.model_torch
import zoo
from zoo.registry import get
started = time.perf_counter()
found = get("minilm_l6")
inputs = found.model.inputs(found.config)
for precision in ("float32", "float64"):
    model = zoo.load(sys.argv[1], framework="torch", param_dtype=precision)
    with torch.no_grad():
        model(**{k: torch.from_numpy(v) for k, v in inputs.items()})
    with jax.enable_x64(precision == "float64"):
        model = zoo.load(sys.argv[2], framework="flax", param_dtype=precision)
        graph, state = nnx.split(model)
        run = jax.jit(lambda state, inputs: nnx.merge(graph, state)(**inputs))
        jax.block_until_ready(run(state, inputs))
print(time.perf_counter() - started)
"""
VERIFY = """
import sys, time
import flax.nnx, jax, torch
import zoo.loading.into_flax, zoo.loading.into_torch
import zoo.models.bert.model_flax, zoo.models.bert.model_torch
import convert
started = time.perf_counter()
report = convert.verify(sys.argv[1], sys.argv[2], level="outputs")
assert report.verdict == "same"
print(time.perf_counter() - started)
"""


def seconds(code: str, *arguments: str) -> tuple[float, float]:
    """Wall time of a process that runs `code`, and of its work without the imports."""
    env = {"JAX_PLATFORMS": "cpu"} | os.environ
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    started = time.perf_counter()
    run = subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - started, float(run.stdout)


def main() -> None:
    import convert

    if len(sys.argv) != 2:
        sys.exit(__doc__)
    source = Path(sys.argv[1]) / "model.safetensors"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model.flax"
        convert.convert(source, target)
        times: dict[str, list[tuple[float, float]]] = {"verify": [], "plain": []}
        for _ in range(ROUNDS):
            for name, code in (("plain", PLAIN), ("verify", VERIFY)):
                times[name].append(seconds(code, str(source), str(target)))
    result: dict[str, object] = {
        "model": "minilm_l6",
        "rounds": ROUNDS,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }
    for i, what in enumerate(("process", "work")):
        pairs = [(v[i], p[i]) for v, p in zip(times["verify"], times["plain"], strict=True)]
        result[what] = {
            "verify": round(statistics.median(v for v, _ in pairs), 2),
            "plain": round(statistics.median(p for _, p in pairs), 2),
            "ratio": round(statistics.median(v / p for v, p in pairs), 2),
        }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
