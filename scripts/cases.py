"""Runs the cases of scripts/cases/: pairs and faults written without sight of the detector.

    cases.py faults DIR [-o FILE.json] [NAME ...]   plants every fault, scores what verify says
    cases.py right DIR [-o FILE.json] [NAME ...]    right pairs at every level, ten seeds each

A case file holds a right pair, `build(seed)`, and FAULTS: edits of its source, each with the place,
the causes and the lowest level that can see it, stated before anything was run.

A right pair was checked in eval mode by whoever wrote it. One that differs in training alone, by
the cause `unbiased_variance`, is no false alarm: stock BatchNorm of Flax keeps another variance.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
LEVELS = ("bits", "outputs", "gradients", "training")
_FOLDER = re.compile(re.escape(tempfile.gettempdir()) + r"/case\w+/")  # of a file as edited
MERGED = {"wiring": "operand"}  # words of earlier cases that are others now
NAMELESS = (None, "unknown", "shape", "not_finite")  # what names no cause


def load(path: Path, edits: Any = ()) -> Any:
    """The module of a case file with edits applied to what stands above FAULTS."""
    code, mark, faults = path.read_text().partition("\nFAULTS")
    for old, new in edits:
        if code.count(old) != 1:
            raise ValueError(f"{path.name}: {old!r} stands {code.count(old)} times in the code")
        code = code.replace(old, new)
    folder = Path(tempfile.mkdtemp(prefix="case"))
    target = folder / path.name
    target.write_text(code + mark + faults)
    name = f"{path.stem}_{folder.name}"
    spec = importlib.util.spec_from_file_location(name, target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def verify(case: dict[str, Any], level: str) -> Any:
    """The report of a case."""
    import convert

    given = {k: case[k] for k in ("flax_inputs",) if case.get(k) is not None}
    return convert.verify(case["torch"], case["flax"], case["inputs"], level=level, **given)


# --- Places ---


class Clock:
    """When each submodule's first call begins and ends, counted in torch's operations."""

    def __init__(self, case: dict[str, Any]) -> None:
        import torch
        from torch.overrides import TorchFunctionMode

        from convert.runtime.torch_calls import hooked

        self.spans: dict[str, list[float]] = {}
        count = 0.0

        class Count(TorchFunctionMode):
            def __torch_function__(self, f: Any, t: Any, args: Any = (), kwargs: Any = None) -> Any:
                nonlocal count
                made = f(*args, **(kwargs or {}))
                count += isinstance(made, torch.Tensor | tuple | list)
                return made

        def enter(name: str, part: Any, args: Any, kwargs: Any) -> Any:
            self.spans.setdefault(name, [count, -1.0])
            return args, kwargs

        def leave(name: str, part: Any, output: Any) -> Any:
            if self.spans[name][1] < 0:
                self.spans[name][1] = count
            return output

        inputs = case["inputs"]
        args: Any = () if isinstance(inputs, dict) else inputs
        args = args if isinstance(args, tuple) else (args,)
        kwargs = inputs if isinstance(inputs, dict) else {}
        dtype = next((p.dtype for p in case["torch"].parameters()), torch.float32)

        def tensor(x: Any) -> Any:
            made = torch.as_tensor(x)
            return made.to(dtype) if made.is_floating_point() else made

        with torch.no_grad(), hooked(case["torch"], enter, leave), Count():
            case["torch"](*map(tensor, args), **{k: tensor(v) for k, v in kwargs.items()})
        self.total = count

    def stretch(self, between: Any) -> tuple[float, float] | None:
        """From the end of one layer to the beginning of another."""
        if between is None:
            return None
        start, end = 0.0, self.total
        if between[0] in self.spans and between[0]:
            start = self.spans[between[0]][1]
        if between[1] in self.spans and between[1]:
            end = self.spans[between[1]][0]
        return (start, end) if start <= end else (end, start)

    def fault(self, fault: dict[str, Any]) -> tuple[float, float]:
        """Where a fault stands."""
        if (found := self.stretch(fault.get("between"))) is not None:
            return found
        start, end = self.spans.get(fault["layers"][0], [0.0, self.total])
        return start, end


def placed(found: Any, fault: dict[str, Any], clock: Clock) -> bool:
    """Whether the layer is one of those stated, or the stretch that is named is short and holds
    the place."""
    if found is None:
        return False
    if found.layer in fault["layers"]:
        return True
    stretch = clock.stretch(found.between)
    if stretch is None:
        return False
    if stretch[1] - stretch[0] > max(5, 0.05 * clock.total):
        return False
    start, end = clock.fault(fault)
    return max(start, stretch[0]) <= min(end, stretch[1])


def run_fault(path: Path, fault: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """What verify says of one fault, and the score."""
    began = time.monotonic()
    causes = [MERGED.get(word, word) for word in fault["causes"]]
    row: dict[str, Any] = {
        "file": path.stem, "title": fault["title"], "level": fault["level"],
        "layers": fault["layers"], "between": fault.get("between"), "causes": causes,
        "flagged": False, "placed": False, "named": 0.0, "wrong": False,
    }  # fmt: skip
    try:
        level = fault["level"] if fault["level"] in LEVELS else "outputs"
        report = verify(load(path, fault["edits"]).build(0), level)
    except Exception as e:
        text = " ".join(str(e).split())[:300]
        row["said"] = f"{type(e).__name__}: {text}"
        row["trace"] = traceback.format_exc()[-1500:]
        # Code that raises is found where the refusal says so.
        row["flagged"] = row["placed"] = fault["level"] == "raises"
        row["named"] = float(fault["level"] == "raises")
        return row | {"seconds": time.monotonic() - began}
    found = report.first_divergence
    spots = [s for s in getattr(report, "blind_spots", []) if s.kind == "training attribute"]
    if fault["level"] == "attributes":
        row["flagged"] = report.verdict == "different" or bool(spots)
        text = " ".join(str(s) for s in spots)
        row["placed"] = any(name in text for name in fault["layers"]) or placed(found, fault, clock)
        row["named"] = float(bool(spots))
        row["said"] = text[:300]
        return row | {"seconds": time.monotonic() - began}
    row["flagged"] = report.verdict == "different"
    row["placed"] = row["flagged"] and placed(found, fault, clock)
    if found is not None and row["flagged"]:
        row |= {
            "layer": found.layer, "where": found.between, "cause": found.cause,
            "said": _FOLDER.sub("", found.diagnosis), "direction": found.direction,
        }  # fmt: skip
        row["named"] = float(found.cause in causes)
        row["wrong"] = found.cause not in NAMELESS and not row["named"]
    else:
        row["said"] = "; ".join(report.notices)[:300]
    return row | {"seconds": time.monotonic() - began}


def faults(paths: list[Path]) -> Iterator[dict[str, Any]]:
    """A row for every fault."""
    for path in paths:
        module = load(path)
        clock = Clock(module.build(0))
        for fault in module.FAULTS:
            row = run_fault(path, fault, clock)
            keys = ("flagged", "placed", "named", "wrong")
            marks = "".join(k[0].upper() if row[k] else "." for k in keys)
            print(f"{marks} {row['seconds']:5.1f}s {path.stem}: {row['title']}")
            print(f"       want {row['causes']} at {row['layers']} {row['between']}")
            print(f"       {row.get('cause')} at {row.get('layer')} {row.get('where')}: "
                  f"{row.get('said')}", flush=True)  # fmt: skip
            yield row


def right(paths: list[Path], seeds: int) -> Iterator[dict[str, Any]]:
    """A row for every right pair, level and seed."""
    for path in paths:
        module = load(path)
        for seed in range(seeds):
            for level in LEVELS:
                began, cause = time.monotonic(), None
                try:
                    report = verify(module.build(seed), level)
                    bits = level == "bits"
                    verdict = report.verdict
                    cause = report.first_divergence and report.first_divergence.cause
                    why = [d.name for d in report.differences if d.count] if bits else [
                        r.name for r in report.rows if r.judged and not r.same]  # fmt: skip
                    if bits and verdict == "different" and not why:
                        verdict = "not paired"  # a tensor without a counterpart is no false alarm
                except Exception as e:
                    verdict, why = "refused", [f"{type(e).__name__}: {e}"[:300]]
                row = {"file": path.stem, "seed": seed, "level": level, "verdict": verdict,
                       "cause": cause, "why": why[:5],
                       "seconds": time.monotonic() - began}  # fmt: skip
                if verdict != "same":
                    print(path.stem, seed, level, verdict, cause, why[:5], flush=True)
                yield row


def summary(rows: list[dict[str, Any]]) -> str:
    """The shares."""
    n = len(rows)
    if not n or "flagged" not in rows[0]:
        verdicts = sorted({r["verdict"] for r in rows})
        return ", ".join(f"{v}: {sum(r['verdict'] == v for r in rows)}" for v in verdicts)
    shares = {k: sum(r[k] for r in rows) / n for k in ("flagged", "placed", "named", "wrong")}
    return f"{n} faults: " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in shares.items())


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("faults", "right"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("-o", dest="out", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    paths = sorted(options.folder.glob("*.py"))
    if options.names:
        paths = [p for p in paths if any(n in p.stem for n in options.names)]
    rows = []
    for row in faults(paths) if options.what == "faults" else right(paths, options.seeds):
        rows.append(row)
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1, default=str) + "\n")
    print(summary(rows))


if __name__ == "__main__":
    main()
