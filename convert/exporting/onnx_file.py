"""Writing an ONNX model. Above 2 GB, protobuf's limit, the tensors lie in a file beside, whose name
has a hash of them: the file that stood keeps its data until the new one takes its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.containers.base import fsync

INLINE_MAX = 1_800_000_000  # bytes of tensors; what the graph itself takes comes on top


def write(model: Any, path: Path, apart: str | None) -> None:
    """Write `model` to `path`, and sync it; its tensors into the file `apart` beside it, where one
    is named."""
    import onnx_ir

    onnx_ir.save(model, path, external_data=apart)
    fsync(path)
    if apart is not None:
        fsync(path.with_name(apart))
