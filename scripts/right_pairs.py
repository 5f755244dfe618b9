"""Right pairs at every level, many seeds: none may be called different without being so.

    right_pairs.py [--seeds N] [-o FILE.json] [NAME ...]

The pairs are those of scripts/cases/, open and sealed, built anew with every seed. One call of
`verify` at "training" judges all four levels, and the table says at which of them a pair differs,
and by which cause. Rows that the file holds already are not run again.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
LEVELS = ("bits", "outputs", "gradients", "training")


def levels_of(report: Any) -> dict[str, str]:
    """The verdict of each level's own rows."""
    rows = {
        "outputs": [*report.outputs, *report.layers],
        "gradients": report.gradients,
        "training": [row for t in report.training for row in t.rows],
    }
    bad = {k: any(r.judged and not r.same for r in v) for k, v in rows.items()}
    bad["bits"] = bool(report.differences)
    return {level: "different" if bad[level] else "same" for level in LEVELS}


def judged(path: Path, seed: int) -> dict[str, Any]:
    """One row: a pair with one seed."""
    import cases
    import jax

    started = time.perf_counter()
    row: dict[str, Any] = {"pair": path.stem, "half": path.parent.name, "seed": seed}
    try:
        report = cases.verify(cases.load(path).build(seed), "training")
        row |= levels_of(report)
        if (found := report.first_divergence) is not None:
            off = [r.name for r in report.rows if r.judged and not r.same]
            row |= {"cause": found.cause, "layer": found.layer, "said": found.diagnosis,
                    "rows": list(dict.fromkeys(off))}  # fmt: skip
    except Exception as e:
        row |= {"refused": f"{type(e).__name__}: {e}"[:300]}
    jax.clear_caches()  # type: ignore[no-untyped-call]
    gc.collect()
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def summary(rows: list[dict[str, Any]]) -> str:
    """How many pairs are the same at each level, and what the others are told."""
    pairs = {row["pair"] for row in rows}
    lines = [f"{len(pairs)} pairs, {len(rows)} runs; refused: {sum('refused' in r for r in rows)}"]
    for level in LEVELS:
        off = [row for row in rows if row.get(level) == "different"]
        lines.append(f"{level}: {len(off)} runs of {len({r['pair'] for r in off})} pairs differ")
    for row in rows:
        if told := row.get("said") or row.get("refused"):
            where = [level for level in LEVELS if row.get(level) == "different"]
            lines.append(f"{row['pair']} {row['seed']} {where} {row.get('cause')}: {told}")
    return "\n".join(lines)


def main() -> None:
    """Run what the command line asks for, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("-o", dest="out", type=Path, default=ROOT / "docs" / "right_pairs.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as cache:  # another seed compiles nothing anew
        _remember(cache)
        _run(options)


def _remember(folder: str) -> None:
    """Keep what JAX compiles in a folder."""
    import jax

    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _run(options: argparse.Namespace) -> None:
    paths = sorted((ROOT / "scripts" / "cases").glob("*/*.py"))
    paths = [p for p in paths if not options.names or p.stem in options.names]
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    done = {(row["pair"], row["seed"]) for row in rows}
    for seed in range(options.seeds):
        for path in paths:
            if (path.stem, seed) in done:
                continue
            rows.append(judged(path, seed))
            print(json.dumps(rows[-1]), flush=True)
            options.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(summary(rows))


if __name__ == "__main__":
    main()
