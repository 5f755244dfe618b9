"""Make every installed model live in JAX and judge it: docs/ported.json and docs/ported.md.

    port_corpus.py [--every N] [NAME ...]     judge them (port_judge.py)
    port_corpus.py --train [NAME ...]         train some of those that are right (port_trained.py)
    port_corpus.py --source [NAME ...]        write those that are right as source, and prove it
    port_corpus.py --text [NAME ...]          write them without a proof, for scripts/lint_ports.py
    port_corpus.py --again OUTCOME            once more what this became of
    port_corpus.py --table                    write docs/ported.md of docs/ported.json

One process a model, 120 s of CPU time each. What was done is done again only where a file of ours
that it rests on has changed. torchvision and timm lie in a folder of their own (scripts/setup);
their compiled operators are not needed.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import corpus_models as corpus
import corpus_page as page

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT), str(ROOT / ".venv" / "vision")]
SOURCES = ROOT / "build" / "ports"  # what --source wrote
LIMIT_S = 120
TRAINED = 24  # models of each package that are trained too
SLOW_S = 30
Row = page.Row


def judge(module: Any, inputs: dict[str, Any]) -> Row:
    """What becomes of a model: see port_judge.py."""
    from port_judge import judged, other_sizes

    return judged(module, inputs, list(other_sizes(module, inputs)))


def glance(module: Any, inputs: dict[str, Any]) -> Row:
    """`judge`, at one size."""
    from port_judge import judged, other_sizes

    return judged(module, inputs, list(other_sizes(module, inputs)), once=True)


def train(module: Any, inputs: dict[str, Any]) -> Row:
    """What becomes of its training: see port_trained.py."""
    from port_trained import trained

    return trained(module, inputs)


def source(make: Callable[[], Any], inputs: dict[str, Any], proof: bool = True) -> Row:
    """What becomes of it written as source, by `convert.port` and its own proof."""
    import convert
    from zoo.containers.errors import NotEquivalent, ZooError

    try:
        made = convert.port(make, inputs, verify=proof)
    except NotEquivalent as e:
        return {"outcome": "differs", "why": e.details[0] if e.details else e.problem}
    except ZooError as e:
        return {"outcome": "refused", "why": e.problem, "details": list(e.details)}
    own, theirs = made.file.statements
    row = {
        "outcome": "written",
        "lines": len(made.source.splitlines()),
        "ratio": round(own / max(theirs, 1), 2),
        "twins": twins(made.source),
        "renamed": renamed(made.layout),
        "source": made.source,
    }
    if not proof:
        return row
    worst = max((r.ratio for rows in made.proved.rows.values() for r in rows), default=0.0)
    verdict = "verified" if made.proved.verdict == "same" else made.proved.verdict
    return row | {"outcome": verdict, "worst": worst, "sizes": len(made.proved.rows)}


def text(make: Callable[[], Any], inputs: dict[str, Any]) -> Row:
    """`source`, without a proof."""
    return source(make, inputs, proof=False)


def twins(text: str) -> list[str]:
    """The classes of a port that are another one of it up to constants: both come from one class of
    torch's, and read the same with every number and word taken out, and parts that are such twins
    taken for each other."""
    every = [c for c in ast.parse(text).body if isinstance(c, ast.ClassDef)]
    seen: dict[tuple[str | None, str], str] = {}
    first: dict[str, str] = {}  # every class -> the one it is
    for one in every:  # parts come before what they are parts of
        plain = ast.parse(ast.unparse(one))
        for node in ast.walk(plain):
            if isinstance(node, ast.Constant):
                node.value = 0
            elif isinstance(node, ast.Name):
                node.id = first.get(node.id, node.id)
            elif isinstance(node, ast.ClassDef):
                node.name = ""
        first[one.name] = seen.setdefault((ast.get_docstring(one), ast.dump(plain)), one.name)
    return [f"{name} is {other}" for name, other in first.items() if name != other]


def renamed(layout: Any) -> list[str]:
    """Torch's tensors whose module Flax has under another name."""

    def module(name: str) -> str:
        return name.rpartition(".")[0]

    return [
        e.torch[0].name
        for e in layout.entries
        if len(e.torch) == len(e.flax) == 1 and module(e.torch[0].name) != module(e.flax[0].name)
    ]


def built(name: str) -> tuple[Any, dict[str, Any], str]:
    """See corpus_models.build; the same weights every time."""
    import torch

    torch.manual_seed(0)
    made: tuple[Any, dict[str, Any], str] = corpus.build(name)
    return made


JOBS = {"judge": judge, "glance": glance, "train": train, "source": source, "text": text}


def result(job: str, name: str) -> Row:
    """What becomes of a model under a job. "not made": torch itself does not run it as it was made
    here; "fault": an error that is no answer of ours."""
    try:
        module, inputs, shrunk = built(name)
    except Exception as e:  # whatever a model raises that small sizes break
        return {"outcome": "not made", "why": corpus.failure_class(f"{type(e).__name__}: {e}")}
    # Ports are made of what makes a model, as on the command line: so constructors are seen.
    if job in ("source", "text"):
        module = lambda: built(name)[0]  # noqa: E731
    try:
        row = JOBS[job](module, inputs)
    except Exception as e:
        traceback.print_exc()
        row = {"outcome": "fault", "why": corpus.failure_class(f"{type(e).__name__}: {e}")}
    if text := row.pop("source", ""):
        SOURCES.mkdir(parents=True, exist_ok=True)
        (SOURCES / f"{name.replace('/', '_').replace('-', '_')}.py").write_text(text)
    told = "; ".join([row.pop("why", ""), *row.pop("details", [])[:2]]).strip("; ")
    if "does not run on these" in told:
        row["outcome"] = "not made"
    if told:
        row["why"] = re.sub(r"\S*/(?=(timm|torchvision|transformers|torch|convert)/)", "", told)
    return row | {"shrunk": shrunk}


@cache
def source_hash(job: str, package: str) -> str:
    """What a result rests on: these scripts and the converter, and of it the writing of source
    where that is what is judged."""
    kind = "transformers" if package == "transformers" else "models"
    scripts = Path(__file__).parent
    files = [scripts / f"corpus_{kind}.py", scripts / "port_judge.py"]
    files += [scripts / "port_trained.py"] if job == "train" else []
    rooms = [ROOT / "convert" / "program", ROOT / "convert" / "porting"]
    files += sorted(f for room in rooms for f in room.rglob("*.py"))
    if job not in ("source", "text"):
        files = [f for f in files if "rendering" not in f.parts]
    trees = [ast.dump(ast.parse(f.read_text())) for f in files]  # comments change no result
    return hashlib.sha256("".join(trees).encode()).hexdigest()[:16]


def to_train(done: page.Rows) -> list[str]:
    """As many of each package, drawn by a seed among those that are right and not the slowest."""
    chosen = []
    for package in ("torchvision", "timm", "transformers"):
        right = sorted(
            name
            for name, row in done.items()
            if name.startswith(package + "/")
            and row["outcome"] == "right"
            and row["seconds"] < SLOW_S
        )
        chosen += random.Random(0).sample(right, min(TRAINED, len(right)))
    return chosen


def forked(job: str, name: str, limit: int, answer: Connection) -> None:
    """A job in this process, which dies once it has used `limit` seconds of both cores."""
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))  # SIGXCPU, then SIGKILL
    answer.send(result(job, name) | {"seconds": round(time.process_time(), 1)})


def run_one(job: str, name: str, limit: int) -> Row:
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
        slow = process.exitcode in (
            -signal.SIGXCPU,
            -signal.SIGKILL,
        )  # the soft limit, the hard one
        died = {"outcome": "fault", "why": f"died with exit code {process.exitcode}"}
        return ({"outcome": "too slow"} if slow else died) | {"seconds": float(limit)}
    finally:
        process.kill()
        process.join()


def preload() -> None:
    """Import what every job needs, so that the forked ones have it."""
    corpus.names()
    for module in ("jax", "flax.nnx", "torch.export", "convert", "convert.porting.to_flax"):
        importlib.import_module(module)


def stale(job: str, name: str, row: Row) -> bool:
    """Whether a row is missing, or rests on an earlier state of the converter."""
    return row.get("hash") != source_hash(job, name.partition("/")[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--source", action="store_true")
    parser.add_argument("--text", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--stale", action="store_true", help="keep results of earlier sources")
    parser.add_argument("--again", metavar="OUTCOME", help="what this became of, once more")
    parser.add_argument("--limit", type=int, default=LIMIT_S, help="seconds of CPU time a model")
    parser.add_argument("--scratch", action="store_true", help="at one size, no results kept")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--every", type=int, default=1, help="one model of so many")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    job = "train" if options.train else "source" if options.source else "judge"
    job = "text" if options.text else job
    job = "glance" if options.scratch else job
    every = corpus.names()
    done = page.held()
    judged = done.get("judge", {})
    if job == "train":
        wanted = to_train(judged)
    elif job in ("source", "text"):
        wanted = [n for n, row in judged.items() if row["outcome"].startswith("right")]
    else:
        wanted = every
    wanted = options.names or wanted[:: options.every]

    def needed(name: str) -> bool:
        row = done.get(job, {}).get(name, {})
        if options.again:
            return row.get("outcome") == options.again
        return stale(job, name, row) and not (options.stale and row)

    wanted = [] if options.table else [n for n in wanted if needed(n)]
    if options.list:
        print("\n".join(wanted))
        return
    if wanted:
        preload()
    with ThreadPoolExecutor(options.workers) as pool:
        for name, row in pool.map(lambda n: (n, run_one(job, n, options.limit)), wanted):
            digest = {"hash": source_hash(job, name.partition("/")[0])}
            if not options.scratch:
                page.keep(job, name, row | digest)
            why = f": {row['why']}" if "why" in row else ""
            print(f"{name}: {row['outcome']}{why} ({row['seconds']} s)", flush=True)
    if not options.scratch:
        judged = page.held().get("judge", {})
        page.write(len(every), sum(stale("judge", n, row) for n, row in judged.items()))


if __name__ == "__main__":
    os.environ["JAX_ENABLE_X64"] = "1"  # before JAX is imported
    main()
