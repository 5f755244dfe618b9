"""The three checkpoints that the engine is measured on, and their layouts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from zoo.containers import dtypes
from zoo.containers.base import TensorInfo, Writer
from zoo.containers.safetensors_file import SafetensorsWriter
from zoo.containers.sharded import ShardedSafetensorsWriter
from zoo.layout import Entry, Layout, embedding, linear, norm
from zoo.registry import get

_BLOCK = 1 << 24  # numbers that are drawn; tensors are stretches of them


def bert_layout() -> Layout:
    """BERT-large: 1.34 GB of float32, matrices of 4 and 16 MB and one of 125 MB."""
    found = get("bert_large_uncased")
    return found.model.layout_of(found.config)


def decoder_layout(layers: int = 9) -> Layout:
    """Decoder-shaped: matrices of 34 and 90 MB in bfloat16, 4 GB of them."""
    entries: list[Entry] = [*embedding("embed", 32000, 4096)]
    for i in range(layers):
        for name in ("q", "k", "v", "o"):
            entries += linear(f"layers.{i}.attention.{name}", 4096, 4096, bias=False)
        for name, sizes in (
            ("up", (4096, 11008)),
            ("gate", (4096, 11008)),
            ("down", (11008, 4096)),
        ):
            entries += linear(f"layers.{i}.mlp.{name}", *sizes, bias=False)
        entries += norm(f"layers.{i}.norm", 4096, bias=False)
    return Layout([*entries, *norm("norm", 4096, bias=False)])


def single_layout() -> Layout:
    """One matrix of 1 GiB."""
    return Layout([*linear("one", 16384, 16384, bias=False)])


def make(folder: Path, name: str, shrink: int = 1) -> tuple[Path, list[str]]:
    """Write a checkpoint of torch's names; its path, and the options that say what it is. `shrink`
    takes fewer layers, for a first look."""
    layout, dtype = {
        "bert": (bert_layout(), "F32"),
        "decoder": (decoder_layout(max(1, 9 // shrink)), "BF16"),
        "single": (single_layout(), "F32"),
    }[name]
    header = {n: TensorInfo(dtype, s) for n, s in layout.shapes("torch").items()}
    if name == "bert":
        path, options = folder / "bert.safetensors", []
        writer: Writer = SafetensorsWriter(path, header, {"format": "pt"})
    else:
        stated = folder / f"{name}.layout.json"
        stated.write_text(json.dumps(layout.to_json()))
        options = ["--layout", str(stated)]
        path = folder / name
        writer = ShardedSafetensorsWriter(path, header, {"format": "pt"}, 1_000_000_000)
    with writer:
        _fill(writer, header)
    return path, options


def _fill(writer: Writer, header: Mapping[str, TensorInfo]) -> None:
    rng = np.random.default_rng(0)
    block = (rng.standard_normal(_BLOCK, np.float32) * np.float32(0.02)).view(np.uint8)
    for i, (name, info) in enumerate(header.items()):
        start = 64 * (i * 1009 % 10007)
        raw = np.resize(block[start:], info.nbytes)
        writer.write(name, raw.view(dtypes.NUMPY[info.dtype]).reshape(info.shape))
    writer.finish()
