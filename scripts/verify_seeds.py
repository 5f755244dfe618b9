"""No false alarm: a small configuration of every family, ten seeds of weights and inputs.

Each pair goes through `convert.verify` as a user's would: a safetensors checkpoint, the msgpack one
that was converted from it, level "training". Writes docs/seeds.json. One process a family.
Arguments are names of families; none means all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np

RESULTS = Path(__file__).parents[1] / "docs" / "seeds.json"
SEEDS = range(10)


def checkpoint(folder: Path, name: str, seed: int) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """A torch and a Flax checkpoint of one seed's weights, and one seed's inputs."""
    import convert
    from zoo import probe
    from zoo.checkpoint.label import Label
    from zoo.containers.base import TensorInfo
    from zoo.containers.safetensors_file import SafetensorsWriter
    from zoo.registry import families

    model = families()[name]
    config = next(iter(model.tiny.values()))
    arrays = {
        t.name: probe.weight(f"{seed}.{t.name}", t.shape)
        for e in model.layout_of(config).entries
        if e.constant is None and e.tied_to is None
        for t in e.torch
    }
    a, b = folder / f"{seed}.safetensors", folder / f"{seed}.msgpack"
    header = {n: TensorInfo("F32", x.shape) for n, x in arrays.items()}
    with SafetensorsWriter(a, header, Label(model, config).to_metadata()) as writer:
        for tensor, x in arrays.items():
            writer.write(tensor, x)
        writer.finish()
    convert.convert(a, b)
    normal, integers = probe.normal, probe.integers
    with (
        mock.patch.object(probe, "normal", lambda n, *rest: normal(f"{seed}:{n}", *rest)),
        mock.patch.object(probe, "integers", lambda n, *rest: integers(f"{seed}:{n}", *rest)),
    ):
        return a, b, model.inputs(config)


def measure(name: str) -> dict[str, object]:
    """What ten seeds gave: verdicts, the worst ratio of each level, and what was not judged."""
    import jax

    import convert
    from convert.judge.noise import AGAIN, AGAIN64

    verdicts: dict[str, str] = {}
    worst: dict[str, float] = {}
    again = rows = 0
    unjudged: set[str] = set()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", f"{folder}/cache")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        for seed in SEEDS:
            a, b, inputs = checkpoint(Path(folder), name, seed)
            report = convert.verify(a, b, inputs, "training", seed=seed)
            verdicts[str(seed)] = report.verdict
            groups = {"outputs": report.outputs, "gradients": report.gradients}
            groups |= {t.optimizer: t.rows for t in report.training}
            for group, found in groups.items():
                judged = [r for r in found if r.judged]
                rows += len(judged)
                again += sum(r.note.startswith((AGAIN, AGAIN64)) for r in judged)
                unjudged |= {r.name for r in found if not r.judged}
                ratio = max((r.ratio for r in judged), default=0.0)
                exact = max((r.error64 / r.scale for r in judged if r.scale), default=0.0)
                for key, value in ((group, ratio), (f"{group} float64", exact)):
                    worst[key] = max(worst.get(key, 0.0), value)
                for r in judged:
                    if not r.same:
                        print(f"  {name} {seed} {group} {r}", file=sys.stderr, flush=True)
    return {
        "verdicts": verdicts,
        "rows_judged": rows,
        "noise_measured_again": again,
        "not_judged": sorted(unjudged),
        "worst": {k: float(f"{v:.2g}") for k, v in worst.items()},
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> int:
    if len(sys.argv) == 3 and sys.argv[1] == "--one":
        print(json.dumps(measure(sys.argv[2])))
        return 0
    from zoo.registry import families

    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results = {n: r for n, r in results.items() if n in families()}
    env = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"} | os.environ
    failed = []
    for name in sys.argv[1:] or families():
        command = [sys.executable, __file__, "--one", name]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env)
        if run.returncode:
            return run.returncode
        results[name] = json.loads(run.stdout)
        print(name, json.dumps(results[name]), flush=True)
        failed += [name] if set(results[name]["verdicts"].values()) != {"same"} else []
        RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    print(f"different: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
