"""Every preset of the zoo up to 150 million parameters as ONNX and back: docs/onnx.json, and from
it docs/onnx.md (`scripts/docs.py`).

Weights follow from the tensors' names (`zoo.probe`), so that nothing is hidden by zeros and ones.
Each preset is exported, checked and run by `convert.export` as a user's would be, and converted
back with no flag; what fails is kept with its cause. What is in the file already is not run again:
arguments are presets to run anew, or --missing N for the N smallest that are not there.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "docs" / "onnx.json"
LARGEST = 150_000_000


def sizes() -> dict[str, int]:
    """Preset -> values, smallest first."""
    from zoo.registry import get, names

    found = {}
    for name in names():
        model, config, _ = get(name)
        entries = model.layout_of(config).entries
        found[name] = sum(
            math.prod(t.shape)
            for e in entries
            if e.tied_to is None and e.constant is None
            for t in e.torch
        )
    return dict(sorted(found.items(), key=lambda item: item[1]))


def measure(preset: str) -> dict[str, Any]:
    """What one preset gave."""
    import convert
    from zoo import probe
    from zoo.checkpoint.label import Label
    from zoo.containers.base import TensorInfo
    from zoo.containers.errors import ZooError
    from zoo.containers.safetensors_file import SafetensorsWriter
    from zoo.registry import get

    model, config, _ = get(preset)
    shapes = {
        t.name: t.shape
        for e in model.layout_of(config).entries
        if e.constant is None and e.tied_to is None
        for t in e.torch
    }
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "a.safetensors"), Path(folder, "a.onnx")
        header = {n: TensorInfo("F32", shape) for n, shape in shapes.items()}
        with SafetensorsWriter(source, header, Label(model, config).to_metadata()) as writer:
            for name, shape in shapes.items():
                writer.write(name, probe.weight(name, shape))
            writer.finish()
        begun = time.perf_counter()
        try:
            made = convert.export(source, target)
        except ZooError as e:
            return {"family": model.name, "error": e.problem}
        seconds = time.perf_counter() - begun
        back = Path(folder, "back.safetensors")
        convert.convert(target, Path(folder, "b.msgpack"))
        convert.convert(Path(folder, "b.msgpack"), back)
        same = convert.verify(source, back).verdict == "same"
        worst = made.worst
        assert worst is not None
        return {
            "family": model.name,
            "tensors": made.certificate.verified["tensors"],
            "sizes": {n: list(dims) for n, dims in made.sizes.items()},
            "rows": len(made.held),
            "calls": len({h.sizes for h in made.held}),
            "error64": worst.row.error,
            "ratio": worst.row.ratio,
            "side": worst.side,
            "back": same,
            "seconds": round(seconds, 1),
            "bytes": target.stat().st_size,
            "notices": made.notices,
        }


def main(arguments: list[str]) -> None:
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    every = {n: size for n, size in sizes().items() if size <= LARGEST}
    wanted = arguments
    if arguments[:1] == ["--missing"] or not arguments:
        count = int(arguments[1]) if arguments else len(every)
        wanted = [n for n in every if n not in results][:count]
    for preset in wanted:
        results[preset] = {"values": every[preset]} | measure(preset)
        ordered = {n: results[n] for n in every if n in results}
        RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
        print(preset, results[preset], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
