"""Make every installed model live in JAX and judge it: docs/ported.md.

    scripts/port_corpus.py --operations [NAME ...]    which ATen operations the graphs have

One process a model, 120 s each; what was done stays in .cache/port_corpus.json, and is done again
where the package or a file of ours that it rests on has changed. torchvision and timm may lie in a
folder of PYTHONPATH (`pip install --no-deps --target`); their compiled operators are not needed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import corpus_models as corpus

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "port_corpus.json"
LIMIT_S = 120


def operations(name: str) -> dict[str, Any]:
    """Overload -> how often it stands in the exported graph of a model."""
    import torch

    module, inputs, shrunk = corpus.build(name)
    with torch.no_grad():
        exported = torch.export.export(module, (), inputs, strict=False).run_decompositions({})
    counts = Counter(
        str(node.target)
        for graph in (exported.graph_module, *exported.graph_module.children())
        for node in getattr(graph, "graph", torch.fx.Graph()).nodes
        if node.op == "call_function"
    )
    return {"operations": dict(counts), "shrunk": shrunk}


JOBS = {"operations": operations}


def source_hash(job: str) -> str:
    """What a result rests on: these scripts, and for a judgement the converter too."""
    files = [Path(__file__).with_name("corpus_models.py")]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]


def run_one(job: str, name: str) -> dict[str, Any]:
    """A job in a process of its own, with a limit on its time."""
    command = [sys.executable, __file__, "--one", job, name]
    started = time.perf_counter()
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
        lines = run.stdout.strip().splitlines()
        result = json.loads(lines[-1]) if not run.returncode else {"error": run.stderr[-3000:]}
    except subprocess.TimeoutExpired:
        result = {"error": f"TimeoutExpired: {LIMIT_S} s"}
    return result | {"seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("JOB", "NAME"))
    parser.add_argument("--operations", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--every", type=int, default=1, help="one model of so many")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(JOBS[options.one[0]](options.one[1])))
        return
    wanted = options.names or corpus.names()[:: options.every]
    if options.list:
        print("\n".join(wanted))
        return
    job = "operations"
    cache = json.loads(CACHE.read_text()) if CACHE.is_file() else {}
    digest = source_hash(job)
    for name in wanted:
        key = f"{job} {name}"
        if cache.get(key, {}).get("hash") != digest:
            cache[key] = run_one(job, name) | {"hash": digest}
            CACHE.parent.mkdir(exist_ok=True)
            CACHE.write_text(json.dumps(cache, indent=1))
        found = cache[key]
        said = corpus.failure_class(found["error"]) if "error" in found else "exported"
        print(f"{name}: {said} ({found['seconds']} s)", flush=True)


if __name__ == "__main__":
    main()
