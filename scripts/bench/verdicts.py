"""A `same` verdict on two modules, beside running both of them in float32 and in float64.

    verdicts.py DIR [NAME ...] [-o FILE.json]

The pairs are the right ones of case files (scripts/cases/): modules of anybody's, tiny, so that the
time is that of tracing and compiling, of which both have their share. Each is run in turn, as often
as ROUNDS, with JAX's caches cleared; the plain run calls each model once in either precision,
Flax's under jit. Medians of the ratios, and of seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
ROUNDS = 3


def plain(case: dict[str, Any]) -> None:
    """Both models once in both precisions."""
    import jax
    import torch

    from convert.compare.module_calls import fit_calls, split_sides
    from convert.compare.report import Report
    from convert.runtime.flax_module import flax_module
    from convert.runtime.torch_calls import arguments
    from convert.runtime.torch_module import replica

    net, flax, _ = split_sides(case["torch"], case["flax"], None)
    given = case["inputs"], case.get("flax_inputs")
    call, flax_call, _ = fit_calls(net, flax, *given, Report("", "", "outputs"))
    for precision in ("float32", "float64"):
        args, kwargs = arguments(call, precision)
        with torch.no_grad():
            replica(net, precision)(*args, **kwargs)
        side = flax_module(flax, precision)
        with side.precise():
            args, kwargs = side.arguments(flax_call)
            run = jax.jit(lambda values, side=side, a=args, k=kwargs: side(values, a, k)[0])
            jax.block_until_ready(run(side.values))


def verdict(case: dict[str, Any]) -> None:
    """What a user calls."""
    import cases

    assert cases.verify(case, "outputs").verdict == "same"


def seconds(work: Callable[[dict[str, Any]], None], case: dict[str, Any]) -> float:
    import jax

    jax.clear_caches()  # type: ignore[no-untyped-call]
    case = {**case, "torch": copy.deepcopy(case["torch"])}
    started = time.perf_counter()
    work(case)
    return time.perf_counter() - started


def main() -> None:
    import cases

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for path in sorted(given.folder.glob("*.py")):
        if given.names and path.stem not in given.names:
            continue
        case = cases.load(path).build(0)
        seconds(plain, case)  # imports, and what is made once a process
        pairs = [(seconds(verdict, case), seconds(plain, case)) for _ in range(ROUNDS)]
        rows.append({
            "pair": path.stem,
            "verify": round(statistics.median(v for v, _ in pairs), 2),
            "plain": round(statistics.median(p for _, p in pairs), 2),
            "ratio": round(statistics.median(v / p for v, p in pairs), 2),
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    ratios = [r["ratio"] for r in rows]
    print(f"{len(rows)} pairs: ratio {statistics.median(ratios):.2f}, largest {max(ratios):.2f}")
    if given.output:
        given.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
