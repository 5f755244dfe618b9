"""Right pairs at every level, many seeds: none may be called different without being so.

    right_pairs.py [--seeds N] [-o FILE.json] [NAME ...]
    right_pairs.py --bits

The pairs are those of scripts/cases/, open and sealed, built anew with every seed. One call of
`verify` at "training" judges the three upper levels, and the table says at which of them a pair
differs, and by which cause. `--bits` judges the tensors alone, of all pairs with seed 0, and writes
docs/right_bits.json: weights are seeded, but how they lie is the pair's.

The pairs come in an order that ORDER's seed drew, each with all its seeds before the next, so that
what is done when the time is over was not chosen. Rows that the file holds already are not run
again, but for those marked as from `before` what was changed last.

Those who wrote the pairs checked them in eval mode, by their outputs: some do train otherwise. Such
a pair differs as it is written, with seed 0, and every seed is judged where Flax is mended in
exactly what that row names, which proves the cause if it is then the same: BatchNorm's running
variance (by Flax's own code with two lines changed), what MENDS changes, and of a recurrent layer's
two biases only one that is trained, as Flax has only one.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import inspect
import json
import random
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
LEVELS = ("outputs", "gradients", "training")
BITS = ROOT / "docs" / "right_bits.json"
ORDER = random.Random(0)

# What mends the Flax side of a pair, whose gradients differ at these inputs, in its source.
MENDS = {
    "c_gcn": [(
        "degree = jnp.maximum(jnp.sum(loops, axis=-1), 1.0)",
        "degree = jnp.sum(loops, axis=-1)\n    degree = jnp.where(degree < 1.0, 1.0, degree)",
    )],
    "c_spectrogram": [(
        "    std = jnp.std(x, axis=1, keepdims=True)\n",
        "    var = jnp.var(x, axis=1, keepdims=True)\n"
        "    std = jnp.where(var > 0, jnp.sqrt(jnp.where(var > 0, var, 1.0)), 0.0)\n",
    )],
    "d_recurrent_policy": [("jnp.where(resets[:, None] > 0, 0.0, s)", "(1 - resets[:, None]) * s")],
}  # fmt: skip


def levels_of(report: Any) -> dict[str, str]:
    """The verdict of each level's own rows, of the levels that run both sides."""
    rows = {
        "outputs": [*report.outputs, *report.layers],
        "gradients": report.gradients,
        "training": [row for t in report.training for row in t.rows],
    }
    bad = {k: any(r.judged and not r.same for r in v) for k, v in rows.items()}
    return {level: "different" if bad[level] else "same" for level in rows}


def judged(path: Path, seed: int, mended: bool = False) -> dict[str, Any]:
    """One row: a pair with one seed."""
    import cases
    import jax

    started = time.perf_counter()
    row: dict[str, Any] = {"pair": path.stem, "half": path.parent.name, "seed": seed}
    row |= {"mended": True} if mended else {}
    try:
        case = cases.load(path, MENDS.get(path.stem, ()) if mended else ()).build(seed)
        with mended_batchnorm() if mended else contextlib.nullcontext():
            if mended:
                hold_a_bias(case["torch"])
            report = cases.verify(case, "training")
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


def bits(path: Path) -> dict[str, Any]:
    """A pair's tensors, with seed 0: which are not the same."""
    import cases

    try:
        report = cases.verify(cases.load(path).build(0), "bits")
    except Exception as e:
        return {"verdict": "refused", "tensors": [], "why": f"{type(e).__name__}: {e}"[:300]}
    return {"verdict": report.verdict, "tensors": [d.name for d in report.differences]}


def hold_a_bias(net: Any) -> None:
    """Both biases of every LSTM in the first, and only that one trained, as Flax has it."""
    import torch

    for part in net.modules():
        if isinstance(part, torch.nn.LSTM):
            for name, second in part.named_parameters():
                if "bias_hh" in name:
                    getattr(part, name.replace("bias_hh", "bias_ih")).data += second.data
                    second.requires_grad_(False).zero_()


@contextlib.contextmanager
def mended_batchnorm() -> Iterator[None]:
    """Flax's BatchNorm, of both kinds, with torch's running variance."""
    from flax import linen, nnx

    own = linen.BatchNorm.__call__, nnx.BatchNorm.__call__
    for kind in (linen, nnx):
        rule = kind.BatchNorm
        plain = inspect.unwrap(rule.__call__)
        code = textwrap.dedent(inspect.getsource(plain))
        count = "(x.size // x.shape[-1])"
        for old, new in (
            ("(1 - self.momentum) * var", f"(1 - self.momentum) * var * {count} / ({count} - 1)"),
            ("use_fast_variance=self.use_fast_variance", "use_fast_variance=False"),
        ):
            assert code.count(old) == 1, (kind, old)
            code = code.replace(old, new)
        names = dict(vars(sys.modules[rule.__module__]))
        exec(code, names)  # Flax's own code
        rule.__call__ = names["__call__"]
        if kind is linen:
            rule._wrap_module_attributes()
    try:
        yield
    finally:
        linen.BatchNorm.__call__, nnx.BatchNorm.__call__ = own  # type: ignore[method-assign]


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
    parser.add_argument("--bits", action="store_true")
    parser.add_argument("-o", dest="out", type=Path, default=ROOT / "docs" / "right_pairs.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as cache:  # another seed compiles nothing anew
        _remember(cache)
        if options.bits:
            made = {p.stem: bits(p) for p in sorted((ROOT / "scripts" / "cases").glob("*/*.py"))}
            BITS.write_text(json.dumps(made, indent=1) + "\n")
        else:
            _run(options)


def _remember(folder: str) -> None:
    """Keep what JAX compiles in a folder."""
    import jax

    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _run(options: argparse.Namespace) -> None:
    paths = sorted((ROOT / "scripts" / "cases").glob("*/*.py"))
    paths = ORDER.sample(paths, len(paths))
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    done = {_key(row): row for row in rows if not row.get("before")}
    for path in paths:
        if options.names and path.stem not in options.names:
            continue
        for seed, asked in _runs(options.seeds):
            first = done.get((path.stem, 0, False), {})
            mended = asked and any(first.get(level) != "same" for level in LEVELS)
            if (path.stem, seed, mended) in done:
                continue
            row = judged(path, seed, mended)
            rows = [*(r for r in rows if _key(r) != _key(row)), row]
            done[_key(row)] = row
            print(json.dumps(row), flush=True)
            options.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(summary(rows))


def _key(row: dict[str, Any]) -> tuple[str, int, bool]:
    return row["pair"], row["seed"], row.get("mended", False)


def _runs(seeds: int) -> Iterator[tuple[int, bool]]:
    """Seed 0 as the pair is written; then every seed, mended where that differed."""
    yield 0, False
    yield from ((seed, True) for seed in range(seeds))


if __name__ == "__main__":
    main()
