"""Measure that training goes on in the other framework as if nothing had happened.

Writes docs/resume.json and from it docs/resume.md. Arguments are names of cases; none means all.
One process a case, so that one that fails is told and the others are still measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent))

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "resume.json"


def page(results: dict) -> str:
    """The results as a document."""
    rows = [
        f"| {name} | {run} | {r['error64']:.1e} | {r['error32']:.1e} | {r['share32']:.2f} "
        f"| {'NO' if not r['same'] else 'yes' if r['judged32'] else 'yes, in float64'} |"
        for name, found in results.items()
        for run, r in found["runs"].items()
    ]
    return "\n".join([_HEAD, *rows, ""])


_HEAD = """\
# Training across the border

Written by `scripts/resume.py`, the last measured result. Each case trains 100 steps in PyTorch, and
again with the checkpoint of step 50 (weights, optimizer, step) converted by `convert.convert` and
taken up by the other framework. Data, order and initial weights follow from one description
([scripts/train](../scripts/train)).

float64: the largest relative gap of any step's loss to PyTorch's own curve; the same means at most
1e-9. float32: the same gap, and as a share of what is allowed: at each step 8 times the widest gap
that PyTorch's float32 run has had to its float64 run up to there (and at least 2^-23 of the loss).
SAC has two losses and two optimizers; both are judged.

Adam and AdamW are `convert.optim`'s in Flax. `Adam_stock` and `AdamW_stock` are optax's own: the
same rule, but its `1 - b2^t` is computed in float32 and off by 1e-5 at the first step, so that a
run that begins in Flax leaves PyTorch's float32 curve by more than rounding; they are judged in
float64.

| case | run | float64 gap | float32 gap | of what is allowed | same |
|---|---|---:|---:|---:|---|"""


def main() -> int:
    from training.border import CASES, measure

    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(CASES[sys.argv[2]])))
        return 0
    if unknown := [name for name in sys.argv[1:] if name not in CASES]:
        print(f"error: no case {unknown[0]!r}\ntry: {', '.join(CASES)}", file=sys.stderr)
        return 2
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results = {name: r for name, r in results.items() if name in CASES}
    failed = False
    with tempfile.TemporaryDirectory() as cache:
        # Every run of a case compiles the same step: once is enough.
        told = {"JAX_COMPILATION_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
        told["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        for name in sys.argv[1:] or CASES:
            run = subprocess.run(
                [sys.executable, __file__, "--one", name],
                capture_output=True, text=True, env=os.environ | told,
            )  # fmt: skip
            if run.returncode:
                print(f"{name}: failed\n{run.stderr[-2000:]}", file=sys.stderr, flush=True)
                failed = True
                continue
            results[name] = json.loads(run.stdout.splitlines()[-1])
            print(
                name, "same" if results[name]["same"] else f"DIFFERENT {results[name]}", flush=True
            )
            ordered = {case: results[case] for case in CASES if case in results}
            RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
            (DOCS / "resume.md").write_text(page(ordered))
            failed |= not results[name]["same"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
