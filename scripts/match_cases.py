"""Runs scripts/match_cases/: pairs of checkpoints written without sight of the matcher.

    match_cases.py DIR [-o FILE.json] [--mutations N] [NAME ...]

A case gives PyTorch's tensors, and makes Flax's of them, as some codebase holds the same model:
that is the truth, and a layout is right where its ops make the very same bits. Each pair is matched
twice: "values", both sides holding the same weights, and "names", Flax's values being others.
`--mutations` matches N changed pairs as well: a tensor missing, a layer more, a tensor renamed, two
of one shape exchanged.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
Arrays = dict[str, np.ndarray]


def load(path: Path) -> ModuleType:
    """The module of a case file."""
    shared = str(path.parents[1])  # what the files have in common lies beside their folders
    if shared not in sys.path:
        sys.path.insert(0, shared)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fresh(flax: Mapping[str, np.ndarray]) -> Arrays:
    """Other values in the same shapes."""
    rng = np.random.default_rng(1)
    return {
        n: rng.standard_normal(x.shape).astype(x.dtype) if x.dtype.kind == "f" else x
        for n, x in flax.items()
    }


def outcome(torch: Arrays, flax: Arrays, truth: Arrays, case: Any, folder: Path) -> dict[str, Any]:
    """What the matcher makes of a pair: "right", "wrong", or "refused" with what is open."""
    from safetensors.numpy import save_file

    import convert
    from zoo.containers.errors import ZooError

    files = folder / "torch.safetensors", folder / "flax.safetensors"
    for file, arrays in zip(files, (torch, flax), strict=True):
        save_file({n: np.asarray(x, order="C") for n, x in arrays.items()}, file)
    absent = dict.fromkeys((n for n in case.LEFT if n in torch), "")
    started = time.perf_counter()
    try:
        layout = convert.match(*files, pairs=absent)
    except ZooError as e:
        return {
            "outcome": "refused",
            "open": [e.problem, *e.details],
            "seconds": time.perf_counter() - started,
        }
    wrong = differing(layout, torch, truth, case)
    return {
        "outcome": "wrong" if wrong else "right",
        "wrong": wrong,
        "checked": layout.checked,
        "seconds": time.perf_counter() - started,
    }


def differing(layout: Any, torch: Arrays, truth: Arrays, case: Any) -> list[str]:
    """Flax's tensors that the layout does not give, or gives other bits."""
    from zoo.layout.ops import run

    made: Arrays = {}
    for e in layout.entries:
        if e.flax:
            arrays = run(e.ops, [torch[t.name] for t in e.torch])
            made |= {_bare(t.name): x for t, x in zip(e.flax, arrays, strict=True)}
    wanted = {_bare(n): x for n, x in truth.items() if n not in case.EXTRA}
    return sorted(
        n for n in made.keys() | wanted.keys()
        if n not in made or n not in wanted or made[n].tobytes() != wanted[n].tobytes()
        or made[n].shape != wanted[n].shape
    )  # fmt: skip


def _bare(name: str) -> str:
    """Without the collection of a Linen tree."""
    head, _, rest = name.partition(".")
    return rest if head in ("params", "batch_stats") else name


def mutations(torch: Arrays, flax: Arrays, case: Any, rng: Any) -> Iterator[tuple[str, Any, Any]]:
    """(what was done, torch's tensors, Flax's) of changed pairs, without end."""
    ours = [n for n in torch if n not in case.LEFT and n not in case.TIES]
    ours = [n for n in ours if n not in case.TIES.values()]
    theirs = [n for n in flax if n not in case.EXTRA]
    while True:
        kind = ("missing", "more", "renamed", "exchanged")[int(rng.integers(4))]
        t, f = dict(torch), dict(flax)
        if kind == "missing":
            side, names = ((t, ours), (f, theirs))[int(rng.integers(2))]
            del side[names[int(rng.integers(len(names)))]]
        elif kind == "more":
            numbers = [n for n in ours if any(p.isdigit() for p in n.split("."))]
            if not numbers:
                continue
            name = numbers[int(rng.integers(len(numbers)))].split(".")
            at = next(i for i, p in enumerate(name) if p.isdigit())
            stem = ".".join(name[:at])
            last = max(int(n.split(".")[at]) for n in t
                       if n.startswith(f"{stem}.") and n.split(".")[at].isdigit())  # fmt: skip
            prefix = f"{stem}.{last}."
            copies = {f"{stem}.{last + 1}.{n.removeprefix(prefix)}": x
                      for n, x in t.items() if n.startswith(prefix)}  # fmt: skip
            t |= {n: rng.standard_normal(x.shape).astype(x.dtype) for n, x in copies.items()}
        elif kind == "renamed":
            side, names = ((t, ours), (f, theirs))[int(rng.integers(2))]
            old = names[int(rng.integers(len(names)))]
            parts = old.split(".")
            at = int(rng.integers(len(parts)))
            parts[at] = "".join(chr(97 + int(k)) for k in rng.integers(0, 26, 6))
            new = ".".join(parts)
            changed = {new if n == old else n: x for n, x in side.items()}
            side.clear()
            side |= changed
        else:
            same = {}
            for n in ours:
                same.setdefault(t[n].shape, []).append(n)
            able = [v for v in same.values() if len(v) > 1]
            if not able:
                continue
            group = able[int(rng.integers(len(able)))]
            a, b = rng.choice(len(group), 2, replace=False)
            t[group[a]], t[group[b]] = t[group[b]], t[group[a]]
        yield kind, t, f


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("-o", dest="out", type=Path)
    parser.add_argument("--mutations", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    paths = [p for p in sorted(options.folder.glob("*.py")) if not p.name.startswith("_")]
    paths = [p for p in paths if not options.names or any(n in p.stem for n in options.names)]
    rows: list[dict[str, Any]] = []
    folder = Path(tempfile.mkdtemp(prefix="match"))
    for k, path in enumerate(paths):
        case = load(path)
        torch = case.torch_side()
        flax = case.flax_side(dict(torch))
        about = {"case": path.stem, "architecture": case.ARCHITECTURE, "manner": case.MANNER}
        for mode, held in (("values", flax), ("names", fresh(flax))):
            rows.append(about | {"mode": mode} | outcome(torch, held, flax, case, folder))
        share = options.mutations // len(paths) + (k < options.mutations % len(paths))
        rng = np.random.default_rng(k)
        for (kind, t, f), _ in zip(mutations(torch, flax, case, rng), range(share), strict=False):
            mode = ("values", "names")[int(rng.integers(2))]
            held = f if mode == "values" else fresh(f)
            row = outcome(t, held, f, case, folder)
            rows.append(about | {"mode": mode, "mutation": kind} | row)
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1) + "\n")
    for mode in ("values", "names"):
        plain = [r for r in rows if r["mode"] == mode and "mutation" not in r]
        print(
            mode, {w: sum(r["outcome"] == w for r in plain) for w in ("right", "refused", "wrong")}
        )
        for kind in sorted({r["mutation"] for r in rows if "mutation" in r}):
            of = [r for r in rows if r["mode"] == mode and r.get("mutation") == kind]
            print(" ", kind, {w: sum(r["outcome"] == w for r in of)
                              for w in ("right", "refused", "wrong")})  # fmt: skip


if __name__ == "__main__":
    main()
