"""Make every installed model live in JAX and judge it: docs/ported.md.

    port_corpus.py [--every N] [NAME ...]     judge them (port_judge.py), write docs/ported.md
    port_corpus.py --train [NAME ...]         train some of those that are right (port_trained.py)
    port_corpus.py --source [NAME ...]        write those that are right as source, and prove it
    port_corpus.py --operations [NAME ...]    which ATen operations the graphs have
    port_corpus.py --again OUTCOME            judge those once more that this became of
    port_corpus.py --table                    write docs/ported.md of what is in the cache

One process a model, 120 s of CPU time each; what was done stays in .cache/port_corpus.json, and is
done again where a file of ours that it rests on has changed. torchvision and timm lie in a folder
of their own (scripts/setup); their compiled operators are not needed.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import corpus_models as corpus

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT), str(ROOT / ".venv" / "vision")]
CACHE = ROOT / ".cache" / "port_corpus.json"
TABLE = ROOT / "docs" / "ported.md"
LIMIT_S = 120
TRAINED = 24  # models of each package that are trained too
SLOW_S = 30


HEAD = """# Models made live in JAX

Written by `scripts/port_corpus.py`: models of torchvision, one of each of timm's families, and base
models of transformers with small configurations, made live by `convert.to_flax` and judged apart
from its own proof (`scripts/port_judge.py`): in float64 within 1e-10 of torch's outputs, at the
traced sizes and at up to two others. "right, in float32": the model computes in float32 whatever it
is given, and is within 8 times its own rounding noise. "not made": the small configuration, or the
inputs that the script made for it, do not run in torch. Not every model has been run yet: those of
transformers were taken in an order that a seed drew.
"""

TRAINING_HEAD = """
## Trained

Some of those that are right, drawn by a seed: {count}, {counts}. In float64 and in train mode, with
every dropout at 0 (`scripts/port_trained.py`): the gradients of a loss, and what five steps of SGD
with momentum leave in parameters and running statistics, within 1e-10 of the scale of all of them,
or 8 times what torch does when its inputs move by a rounding. Then, where there is dropout, that it
drops by its key alone.
"""


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


def judge(name: str) -> dict[str, Any]:
    """What becomes of a model: see port_judge.py."""
    import torch
    from port_judge import judged, other_sizes

    torch.manual_seed(0)
    module, inputs, shrunk = corpus.build(name)
    found = judged(module, inputs, list(other_sizes(module, inputs)))
    return found | {"shrunk": shrunk, "class": type(module).__name__}


def train(name: str) -> dict[str, Any]:
    """What becomes of its training: see port_trained.py."""
    import torch
    from port_trained import trained

    torch.manual_seed(0)
    module, inputs, shrunk = corpus.build(name)
    return trained(module, inputs) | {"shrunk": shrunk, "class": type(module).__name__}


def source(name: str) -> dict[str, Any]:
    """What becomes of it written as source, by `convert.port` and its own proof."""
    import torch

    import convert
    from zoo.containers.errors import NotEquivalent, ZooError

    torch.manual_seed(0)
    module, inputs, shrunk = corpus.build(name)
    told: dict[str, Any] = {"shrunk": shrunk, "class": type(module).__name__}
    try:
        made = convert.port(module, inputs)
    except NotEquivalent as e:
        return told | {"outcome": "differs", "why": e.details[0] if e.details else e.problem}
    except ZooError as e:
        return told | {"outcome": "refused", "why": e.problem, "details": list(e.details)[:3]}
    own, theirs = made.file.statements
    worst = max((r.ratio for rows in made.proved.rows.values() for r in rows), default=0.0)
    return told | {
        "outcome": "verified" if made.proved.verdict == "same" else made.proved.verdict,
        "worst": worst,
        "sizes": len(made.proved.rows),
        "lines": len(made.source.splitlines()),
        "ratio": round(own / max(theirs, 1), 2),
    }


def glance(name: str) -> dict[str, Any]:
    """`judge`, at one size."""
    import torch
    from port_judge import judged, other_sizes

    torch.manual_seed(0)
    module, inputs, _ = corpus.build(name)
    return judged(module, inputs, list(other_sizes(module, inputs)), once=True)


JOBS = {
    "operations": operations,
    "judge": judge,
    "glance": glance,
    "train": train,
    "source": source,
}


@cache
def source_hash(job: str, package: str) -> str:
    """What a result rests on: these scripts, and for a judgement the converter too."""
    kind = "transformers" if package == "transformers" else "models"
    files = [Path(__file__).with_name(f"corpus_{kind}.py")]
    if job != "operations":
        files += [Path(__file__).with_name("port_judge.py")]
        for room in ("convert/porting", "convert/program"):
            files += sorted((ROOT / room).rglob("*.py"))
    if job == "train":
        files += [Path(__file__).with_name("port_trained.py")]
    trees = [ast.dump(ast.parse(f.read_text())) for f in files]  # comments change no result
    return hashlib.sha256("".join(trees).encode()).hexdigest()[:16]


def to_train(done: dict[str, Any]) -> list[str]:
    """As many of each package, drawn by a seed among those that are right and not the slowest."""
    chosen = []
    for package in ("torchvision", "timm", "transformers"):
        right = sorted(
            name
            for key, row in done.items()
            if (name := key.removeprefix("judge ")).startswith(package + "/")
            and row.get("outcome") == "right"
            and row["seconds"] < SLOW_S
        )
        chosen += random.Random(0).sample(right, min(TRAINED, len(right)))
    return chosen


def to_write(done: dict[str, Any]) -> list[str]:
    """Every model that is right."""
    return [
        key.removeprefix("judge ")
        for key, row in done.items()
        if key.startswith("judge ") and str(row.get("outcome", "")).startswith("right")
    ]


def forked(job: str, name: str, limit: int, answer: Connection) -> None:
    """A job in this process, which dies once it has used `limit` seconds of both cores."""
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))  # SIGXCPU, then SIGKILL
    try:
        result = JOBS[job](name)
    except Exception:
        result = {"error": traceback.format_exc()[-3000:]}
    answer.send(result | {"seconds": round(time.process_time(), 1)})


def run_one(job: str, name: str, limit: int) -> dict[str, Any]:
    """A job in a process of its own, forked off this one, which has imported the frameworks."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    process = fork.Process(target=forked, args=(job, name, limit, there))
    process.start()
    there.close()
    try:
        return dict(here.recv())
    except EOFError:
        process.join()
        slow = process.exitcode == -signal.SIGXCPU
        said = f"TimeoutExpired: {limit} s" if slow else f"Died: exit code {process.exitcode}"
        return {"error": said, "seconds": float(limit)}
    finally:
        process.kill()
        process.join()


def held() -> dict[str, Any]:
    """What runs so far have found."""
    return dict(json.loads(CACHE.read_text())) if CACHE.is_file() else {}


def preload() -> None:
    """Import what every job needs, so that the forked ones have it."""
    corpus.names()
    for module in ("jax", "flax.nnx", "torch.export", "convert", "convert.porting.to_flax"):
        importlib.import_module(module)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", action="store_true")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--source", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--stale", action="store_true", help="keep results of earlier sources")
    parser.add_argument("--again", metavar="OUTCOME", help="those that this became of, once more")
    parser.add_argument("--limit", type=int, default=LIMIT_S, help="seconds of CPU time a model")
    parser.add_argument("--scratch", action="store_true", help="at one size, no results kept")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--every", type=int, default=1, help="one model of so many")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    done = {} if options.scratch else held()
    if options.table:
        TABLE.write_text(table(done))
        return
    every = to_train(done) if options.train else corpus.names()
    every = to_write(held()) if options.source else every
    wanted = options.names or every[:: options.every]
    if options.list:
        print("\n".join(wanted))
        return
    job = "operations" if options.operations else "train" if options.train else "judge"
    job = "source" if options.source else job
    job = "glance" if options.scratch else job
    preload()

    def needed(name: str) -> bool:
        row = done.get(f"{job} {name}", {})
        if options.again:
            return bool(row) and outcome(row) == options.again
        stale = row.get("hash") != source_hash(job, name.partition("/")[0])
        return stale and not (options.stale and row)

    def do(name: str) -> tuple[str, dict[str, Any]]:
        digest = source_hash(job, name.partition("/")[0])
        return name, run_one(job, name, options.limit) | {"hash": digest}

    with ThreadPoolExecutor(options.workers) as pool:
        for name, found in pool.map(do, [n for n in wanted if needed(n)]):
            if not options.scratch:
                done = held() | {f"{job} {name}": found}  # another run may have written meanwhile
                CACHE.parent.mkdir(exist_ok=True)
                CACHE.write_text(json.dumps(done, indent=1))
            said = corpus.failure_class(found["error"]) if "error" in found else "done"
            said = found.get("outcome", said) + (f": {found['why']}" if "why" in found else "")
            print(f"{name}: {said} ({found['seconds']} s)", flush=True)
    if job != "operations" and not options.scratch:
        TABLE.write_text(table(done))


def table(done: dict[str, Any]) -> str:
    """docs/ported.md: what became of every model that was run."""
    rows = {k.partition(" ")[2]: v for k, v in done.items() if k.startswith("judge ")}
    packages: dict[str, Counter[str]] = {}
    for name, row in rows.items():
        packages.setdefault(name.partition("/")[0], Counter())[outcome(row)] += 1
    older = sum(r["hash"] != source_hash("judge", n.partition("/")[0]) for n, r in rows.items())
    kinds = sorted({k for counts in packages.values() for k in counts})
    lines = [
        HEAD,
        f"| package | run | {' | '.join(kinds)} |",
        f"|---|---:|{'---:|' * len(kinds)}",
    ]
    for package, counts in sorted(packages.items()):
        cells = " | ".join(str(counts[k]) for k in kinds)
        lines.append(f"| {package} | {counts.total()} | {cells} |")
    if older:
        lines += ["", f"{older} of these were judged with an earlier state of the converter."]
    lines += [
        "",
        "| model | outcome | worst | sizes | seconds | what, and why |",
        "|---|---|---:|---:|---:|---|",
    ]
    for name, row in sorted(rows.items()):
        worst = f"{row['worst']:.1e}" if "worst" in row else ""
        why = row.get("why") or (corpus.failure_class(row["error"]) if "error" in row else "")
        details = "; ".join(row.get("details", [])[:2])
        told = " ".join(filter(None, [row.get("shrunk", ""), why, details])).replace("|", "\\|")
        told = re.sub(r"\S*/(?=(timm|torchvision|transformers|torch)/)", "", told)
        cells = (name, outcome(row), worst, row.get("sizes", ""), row["seconds"], told[:300])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, *training_table(done), *source_table(done)]) + "\n"


SOURCE_HEAD = """
## Written as source

Of those that are right, {count} were written as Flax source by `convert.port` and held against
torch by its own proof, in float32 and in float64, at the traced sizes and at others: {counts}.
Statements of the port for each statement of the source that an operation comes from: {median:.2f}
in the median, {worst:.2f} at the 90th percentile.
"""


def told_of(row: dict[str, Any]) -> str:
    """A port's outcome: an error that is no answer of ours is a fault."""
    slow = row.get("error", "").startswith("TimeoutExpired")
    return "too slow" if slow else "fault" if "error" in row else str(row["outcome"])


def source_table(done: dict[str, Any]) -> list[str]:
    """The lines of what became of those that were written as source."""
    rows = {k.partition(" ")[2]: v for k, v in done.items() if k.startswith("source ")}
    if not rows:
        return []
    ratios = sorted(row["ratio"] for row in rows.values() if "ratio" in row) or [0.0]
    lines = [
        SOURCE_HEAD.format(
            count=len(rows),
            counts=", ".join(f"{n} {k}" for k, n in Counter(map(told_of, rows.values())).items()),
            median=ratios[len(ratios) // 2],
            worst=ratios[len(ratios) * 9 // 10],
        ),
        "| model | outcome | of the noise | sizes | lines | statements | seconds | why |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, row in sorted(rows.items()):
        worst = f"{row['worst']:.2g}" if "worst" in row else ""
        why = row.get("why") or (corpus.failure_class(row["error"]) if "error" in row else "")
        why = re.sub(r"\S*/(?=(timm|torchvision|transformers|torch|convert)/)", "", why)
        told = [worst, *(row.get(k, "") for k in ("sizes", "lines", "ratio", "seconds"))]
        cells = map(str, (name, told_of(row), *told, why[:200].replace("|", "\\|")))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def training_table(done: dict[str, Any]) -> list[str]:
    """The lines of what became of those that were trained."""
    rows = {k.partition(" ")[2]: v for k, v in done.items() if k.startswith("train ")}
    if not rows:
        return []
    counts = ", ".join(f"{n} {k}" for k, n in Counter(map(outcome, rows.values())).most_common())
    lines = [
        TRAINING_HEAD.format(count=len(rows), counts=counts),
        "| model | outcome | worst | parameters | statistics | dropout | seconds | why |",
        "|---|---|---:|---:|---:|---|---:|---|",
    ]
    for name, row in sorted(rows.items()):
        worst = f"{row['worst']:.1e}" if "worst" in row else ""
        why = row.get("why") or (corpus.failure_class(row["error"]) if "error" in row else "")
        told = [worst, *(row.get(k, "") for k in ("trained", "statistics", "dropout", "seconds"))]
        lines.append(f"| {' | '.join(map(str, (name, outcome(row), *told, why[:200])))} |")
    return lines


def outcome(row: dict[str, Any]) -> str:
    """A row's outcome in a word or two."""
    if "error" in row:
        return "too slow" if row["error"].startswith("TimeoutExpired") else "not made"
    return "not made" if "does not run on these" in row.get("why", "") else str(row["outcome"])


if __name__ == "__main__":
    os.environ["JAX_ENABLE_X64"] = "1"  # before JAX is imported
    main()
