"""Writing an ONNX model: what belongs together is renamed into place at once, or not at all.

Above 2 GB, protobuf's limit, the tensors lie in a file beside. Its name has a hash of
them: the file that stood keeps the data that it names until the new one takes its place in one
rename.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.containers import filenames
from zoo.containers.base import fsync

INLINE_MAX = 1_800_000_000  # bytes of tensors; what the graph itself takes comes on top


def write(model: Any, place: Path, name: str, apart: str | None) -> list[Path]:
    """Write `model` into the directory `place` as `name`, and sync it; its tensors into the file
    `apart` where one is named. Gives the files, the model last."""
    import onnx_ir

    path = place / name
    onnx_ir.save(model, path, external_data=apart)
    files = [path] if apart is None else [place / apart, path]
    for file in files:
        fsync(file)
    return files


def remove_old_data(target: Path, kept: set[str]) -> None:
    """Remove the data of models that stood at `target` before."""
    for file in target.parent.iterdir():
        if filenames.is_onnx_data(file.name, target.name) and file.name not in kept:
            file.unlink(missing_ok=True)
