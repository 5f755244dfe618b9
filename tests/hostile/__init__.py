"""Files that mean harm, lie or are nonsense, by class; `scripts/hostile` runs commands on each.

A class maps the name of a case to what writes it: a function of an empty folder that gives the path
to hand to a command.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Make = Callable[[Path], Path]
Cases = dict[str, Make]


def file(name: str, raw: bytes) -> Make:
    """A case that is one file."""

    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(raw)
        return path

    return make


def every() -> dict[str, Cases]:
    """All classes."""
    from hostile import beside, msgpacks, onnx_files, orbax, pickles, safetensor, stated

    return {
        "safetensors": safetensor.cases(),
        "pt": pickles.cases(),
        "msgpack": msgpacks.cases(),
        "orbax": orbax.cases(),
        "onnx": onnx_files.cases(),
        "index": stated.indexes(),
        "config": stated.configs(),
        "label": stated.labels(),
        "certificate": beside.certificates(),
        "journal": beside.journals(),
        "optimizer": beside.optimizers(),
        "wheel": beside.cards(),
    }
