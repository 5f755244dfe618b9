"""Flax modules whose every name is scrambled, matched by running both: how much is placed.

    scrambled.py DIR [NAME ...]     the right pairs of scripts/cases, where Flax's side is NNX

Each attribute of each NNX module gets a random name, and weights of its own, so that neither names
nor values tell anything: only the order of execution, kinds, shapes and the outputs do. Prints of
each pair what share of the tensors is placed, whether rightly, and whether the whole is accepted.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]


class Elsewhere:
    """An attribute that a module has by another name; one that it has itself comes first."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: Any, cls: Any = None) -> Any:
        if module is None:
            return self
        return getattr(module, self.name)


def scramble(module: Any, rng: Any) -> Any:
    """The module with random names; its code finds what it asks for by the old ones."""
    from flax import nnx

    made = nnx.clone(module)
    names: dict[tuple[type, str], str] = {}
    for _, part in list(nnx.iter_modules(made)):
        cls = type(part)
        if cls.__module__.startswith("flax."):
            continue  # their leaves are kernel and bias in everybody's code
        for name, value in list(vars(part).items()):
            if name.startswith("_") or not isinstance(value, nnx.Module | nnx.Variable | nnx.List):
                continue
            key = (cls, name)
            if key not in names:
                names[key] = "".join(chr(97 + int(k)) for k in rng.integers(0, 26, 8))
                setattr(cls, name, Elsewhere(names[key]))
            del vars(part)[name]
            setattr(part, names[key], value)
    return made


def same(entry: Any, torch: Any, flax: tuple[str, ...], ops: Any) -> bool:
    """Whether an entry of the truth moves the same elements to the same places."""
    from zoo.layout.ops import run

    rng = np.random.default_rng(0)
    arrays = {t.name: rng.standard_normal(t.shape) for t in (*entry.torch, *torch)}
    wanted, made = (
        dict(zip(names, run(o, [arrays[t.name] for t in side]), strict=True))
        for names, side, o in (
            (tuple(t.name for t in entry.flax), entry.torch, entry.ops), (flax, torch, ops),
        )
    )  # fmt: skip
    return all(n in wanted and np.array_equal(x, wanted[n]) for n, x in made.items())


def fresh(module: Any, rng: Any) -> Any:
    """Other weights."""
    from convert.runtime.flax_module import flax_module, with_values

    values = {
        n: (rng.standard_normal(np.shape(v)) * 0.3 + n.endswith("var")).astype(np.asarray(v).dtype)
        for n, v in flax_module(module).values.items()
        if np.asarray(v).dtype.kind == "f"
    }
    return with_values(module, values)


def main() -> None:
    """Run what the command line asks for."""
    import cases
    from flax import nnx

    import convert
    from convert.matching.evidence import OpenMatch
    from zoo.containers.errors import ZooError

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    placed = every = wrong = accepted = pairs = 0
    for path in sorted(options.folder.glob("*.py")):
        if options.names and not any(n in path.stem for n in options.names):
            continue
        case = cases.load(path).build(0)
        if not isinstance(case["flax"], nnx.Module):
            continue
        started = time.perf_counter()
        rng = np.random.default_rng(7)
        try:
            truth = convert.match(case["torch"], case["flax"])
        except ZooError as e:
            print(f"{path.stem}: no truth to hold against: {e.problem}")
            continue
        plain = {t.name: i for i, e in enumerate(truth.entries) for t in e.flax}
        order = list(plain)
        try:
            other = scramble(case["flax"], rng)
            theirs = fresh(other, rng)
        except Exception as e:  # code that asks for its attributes in its own way
            print(f"{path.stem}: cannot be scrambled: {type(e).__name__}: {e}")
            continue
        from convert.runtime.flax_module import flax_module

        values = {n: np.asarray(v).tobytes() for n, v in flax_module(case["flax"]).values.items()}
        back = {n: next((m for m in order if values[m] == np.asarray(v).tobytes()), n)
                for n, v in flax_module(other).values.items()}  # fmt: skip
        given = {k: case[k] for k in ("flax_inputs",) if case.get(k) is not None}
        try:
            layout = convert.match(case["torch"], theirs, case["inputs"], **given)
            found = [(e.torch, e.flax, e.ops) for e in layout.entries if e.flax]
            verdict = "accepted"
        except OpenMatch as e:
            found, verdict = [(x.torch, x.flax, x.ops) for x in e.entries if x.flax], "open"
        except ZooError as e:
            print(f"{path.stem}: {e.problem}")
            found, verdict = [], "refused"
        except Exception as e:
            print(f"{path.stem}: cannot be run scrambled: {type(e).__name__}: {str(e)[:80]}")
            continue
        right = bad = 0
        for torch, flax, ops in found:
            names = tuple(back[t.name] for t in flax)
            entry = truth.entries[plain[names[0]]] if names[0] in plain else None
            if entry is not None and same(entry, torch, names, ops):
                right += len(flax)
            else:
                bad += len(flax)
        total = len(plain)
        pairs += 1
        accepted += verdict == "accepted"
        placed, every = placed + right, every + total
        wrong += bad if verdict == "accepted" else 0
        seconds = time.perf_counter() - started
        print(f"{path.stem}: {right} of {total} placed, {bad} wrongly, {verdict}, {seconds:.0f} s",
              flush=True)  # fmt: skip
    share = 100 * placed / max(1, every)
    print(f"{placed} of {every} tensors placed ({share:.0f} %); {accepted} of {pairs} pairs "
          f"accepted, with {wrong} tensors wrong")  # fmt: skip


if __name__ == "__main__":
    main()
