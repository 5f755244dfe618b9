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
    takes fewer layers of the decoder, for a first look."""
    if name == "decoder":
        return make_decoder(folder, max(1, 9 // shrink))
    if name == "single":
        return _make_stated(folder, name, single_layout(), "F32")
    header = _header(bert_layout(), "F32")
    path = folder / "bert.safetensors"
    with SafetensorsWriter(path, header, {"format": "pt"}) as writer:
        _fill(writer, header)
    return path, []


def make_decoder(folder: Path, layers: int) -> tuple[Path, list[str]]:
    """The same of the decoder-shaped one, with so many layers: 0.26 GB, and 0.41 GB each."""
    return _make_stated(folder, "decoder", decoder_layout(layers), "BF16")


def _make_stated(folder: Path, name: str, layout: Layout, dtype: str) -> tuple[Path, list[str]]:
    """In shards of 1 GB, of a layout that no family states."""
    header = _header(layout, dtype)
    stated = folder / f"{name}.layout.json"
    stated.write_text(json.dumps(layout.to_json()))
    with ShardedSafetensorsWriter(folder / name, header, {"format": "pt"}, 1_000_000_000) as writer:
        _fill(writer, header)
    return folder / name, ["--layout", str(stated)]


def _header(layout: Layout, dtype: str) -> dict[str, TensorInfo]:
    return {n: TensorInfo(dtype, s) for n, s in layout.shapes("torch").items()}


def make_many(folder: Path, shards: int = 1000, each: int = 100) -> Path:
    """A checkpoint of many shards with many small tensors, as of experts. Written without syncs."""
    folder.mkdir()
    where: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        names = [f"layers.{i}.mlp.experts.{j}.up_proj.weight" for j in range(each)]
        header = {
            n: {"dtype": "BF16", "shape": [8, 16], "data_offsets": [256 * j, 256 * (j + 1)]}
            for j, n in enumerate(names)
        }
        raw = json.dumps(header).encode()
        (folder / file).write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(256 * each))
        where |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def _fill(writer: Writer, header: Mapping[str, TensorInfo]) -> None:
    rng = np.random.default_rng(0)
    block = (rng.standard_normal(_BLOCK, np.float32) * np.float32(0.02)).view(np.uint8)
    for i, (name, info) in enumerate(header.items()):
        start = 64 * (i * 1009 % 10007)
        raw = np.resize(block[start:], info.nbytes)
        writer.write(name, raw.view(dtypes.NUMPY[info.dtype]).reshape(info.shape))
    writer.finish()
