"""Files that say more than they hold: a typed error or a short answer, soon, in little memory."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from convert.cli.main import cli
from zoo.containers.errors import ZooError

ONE = {"a.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}


def safetensors(path: Path, header: Any, data: bytes = bytes(4)) -> Path:
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def memoised(folder: Path) -> Path:
    """A pickle whose list names one megabyte 200,000 times."""
    text = b"x" * 1_000_000
    pickle = b"\x80\x02]q\x00(X" + struct.pack("<I", len(text)) + text + b"q\x01"
    path = folder / "memo.pt"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("a/data.pkl", pickle + b"h\x01" * 200_000 + b"e.")
        z.writestr("a/version", "3\n")
    return path


def many_layers(folder: Path) -> Path:
    safetensors(folder / "model.safetensors", ONE)
    (folder / "config.json").write_text('{"model_type": "bert", "num_hidden_layers": 1000000000}')
    return folder


def many_layers_in_the_label(folder: Path) -> Path:
    label = {"zoo.model": "bert", "zoo.layout": "bert/1"}
    label["zoo.config"] = json.dumps({"num_hidden_layers": 10**9})
    return safetensors(folder / "a.safetensors", {"__metadata__": label} | ONE)


def empty_tensors(folder: Path) -> Path:
    item = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = {f"t{i}.weight": item for i in range(80_000)}
    return safetensors(folder / "a.safetensors", header, b"")


def sparse_config(folder: Path) -> Path:
    safetensors(folder / "model.safetensors", ONE)
    with (folder / "config.json").open("wb") as f:
        f.truncate(3 << 30)
    return folder


def deep_metadata(folder: Path) -> Path:
    label = {"zoo.model": "bert", "zoo.layout": "bert/1", "zoo.config": "[" * 10**5 + "]" * 10**5}
    return safetensors(folder / "a.safetensors", {"__metadata__": label} | ONE)


def index_of_itself(folder: Path) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": path.name}}))
    return path


def endless_number(folder: Path) -> Path:
    header = b'{"a":{"dtype":"F32","shape":[1' + b"0" * 4300 + b'],"data_offsets":[0,4]}}'
    return safetensors(folder / "a.safetensors", header)


def endless_name(folder: Path) -> Path:
    return safetensors(folder / "a.safetensors", {"x" * 4_000_000: ONE["a.weight"]}, bytes(4 << 20))


EVERY = (
    memoised, many_layers, many_layers_in_the_label, empty_tensors, sparse_config, deep_metadata,
    index_of_itself, endless_number, endless_name,
)  # fmt: skip


@pytest.mark.parametrize(
    "command", [["inspect"], ["inspect", "--json"], ["torch2flax", "--dry-run"]]
)
@pytest.mark.parametrize("make", EVERY, ids=lambda f: f.__name__)
def test_soon_and_in_little_memory(
    make: Callable[[Path], Path], command: list[str], tmp_path: Path
) -> None:
    path = make(tmp_path)
    tracemalloc.start()
    started = time.process_time()
    try:
        done = CliRunner().invoke(cli, [*command, str(path)])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 10  # of CPU; traced, and next to nothing without
    assert peak < 256e6
    if done.exit_code:
        assert isinstance(done.exception, ZooError), repr(done.exception)[:500]
        assert len(str(done.exception)) < 10_000
    if "--json" not in command:
        assert len(done.output) < 10_000
