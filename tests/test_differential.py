"""What the reference library rejects and we accept: nothing, but for what is listed here with its
reason. What we reject and it accepts is in docs/containers.md."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzzing
import numpy as np
import pytest
from hostile import onnx_files, pickles

from zoo.containers import open_checkpoint
from zoo.containers.errors import ZooError

RUNS = 700
X = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1, 2])}


def _safetensors(data: bytes) -> None:
    import safetensors

    safetensors.deserialize(data)


def _msgpack(data: bytes) -> None:
    from flax.serialization import msgpack_restore

    if not isinstance(msgpack_restore(data), dict):
        raise ValueError("not a tree")


def _pt(data: bytes) -> None:
    import torch

    torch.load(io.BytesIO(data), weights_only=True)


def _onnx(data: bytes) -> None:
    import onnx

    for tensor in onnx.load_model_from_string(data).graph.initializer:
        if not tensor.data_location:
            onnx.numpy_helper.to_array(tensor)


def good_safetensors() -> list[bytes]:
    from safetensors.numpy import save

    return [save(X), save(X, {"format": "pt"})]


def good_msgpack() -> list[bytes]:
    from flax.serialization import msgpack_serialize

    return [msgpack_serialize({"p": X, "n": 3, "s": np.float32(2), "c": 1 + 2j, "l": [1, "x"]})]


def good_pt(**more: Any) -> list[bytes]:
    import torch

    made = []
    for zipped in (True, False):
        out = io.BytesIO()
        tensors = {n: torch.from_numpy(x.copy()) for n, x in X.items()}
        state = {**tensors, "t": tensors["a.weight"].T, "n": [1, "x"], **more}
        torch.save(state, out, _use_new_zipfile_serialization=zipped)
        made.append(out.getvalue())
    return made


LIBRARY: dict[str, tuple[Callable[[bytes], None], Callable[[], list[bytes]]]] = {
    "safetensors": (_safetensors, good_safetensors),
    "msgpack": (_msgpack, good_msgpack),
    "pt": (_pt, good_pt),
    "onnx": (_onnx, lambda: [onnx_files.GOOD]),
}


def namespace() -> bytes:
    import argparse

    return good_pt(args=argparse.Namespace(lr=0.1))[0]


def odd_identity() -> bytes:
    """torch 2.13 reads a record of its own, with a number that it wrote; we read tensors."""
    data = good_pt()[0]
    at = data.index(b"PK\7\x08", data.index(b".data/serialization_id"))
    return data[: at - 4] + b"\xff\xff\xff\xff" + data[at:]


def odd_attribute() -> bytes:
    more = onnx_files.part(13, b"\xff\xff\xff")  # value_info
    return onnx_files.model(onnx_files.graph(onnx_files.tensor(), more=more))


# reader -> (a part of what the library says, why we go on, a file of that kind)
LISTED: dict[str, list[tuple[str, str, Callable[[], bytes]]]] = {
    "pt": [
        (
            "weights_only|Unsupported|allowlist",
            "classes that torch does not know are not built, but stand for themselves, inert",
            namespace,
        ),
        (
            "codec can't decode",
            "records that hold no tensor, and the names of ones that do not count, are not read",
            odd_identity,
        ),
    ],
    "onnx": [
        (
            "Wire format|Error parsing",
            "parts of the graph that hold no weights are not looked into",
            odd_attribute,
        ),
        (
            "cannot reshape|string",
            "text among the tensors is not read, and named in a notice",
            lambda: onnx_files.model(onnx_files.graph(onnx_files.tensor(dtype=8))),
        ),
    ],
}


def both(reader: str, data: bytes, folder: Path) -> tuple[bool, str | None]:
    """Whether we accept it, and what the library says against it."""
    try:
        fuzzing.TARGETS[reader](data, folder)
    except ZooError:
        return False, None
    with open_checkpoint(folder / f"a.{reader}") as found:
        if found.container != {"pt": "torch"}.get(reader, reader):
            return False, None  # it is another container's, whatever its name
    try:
        LIBRARY[reader][0](data)
    except Exception as e:
        return True, f"{type(e).__name__}: {e}"
    return True, None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reader", LIBRARY)
def test_nothing_else_is_accepted(reader: str, tmp_path: Path) -> None:
    kept, good, rng = fuzzing.corpus(reader), LIBRARY[reader][1](), random.Random(reader)
    every = [*kept, *good * (1 + len(kept) // len(good))]
    taken = 0
    for data in [*every, *(fuzzing.mutated(rng.choice(every), rng, every) for _ in range(RUNS))]:
        ours, theirs = both(reader, data, tmp_path)
        taken += ours
        if ours and theirs:
            listed = [part for part, _, _ in LISTED.get(reader, [])]
            assert any(re.search(part, theirs) for part in listed), (theirs, data)
    assert taken >= len(good)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("reader", "part", "make"),
    [(r, part, make) for r, rows in LISTED.items() for part, _, make in rows],
)
def test_what_is_listed_is_so(
    reader: str, part: str, make: Callable[[], bytes], tmp_path: Path
) -> None:
    ours, theirs = both(reader, make(), tmp_path)
    assert ours
    assert theirs is not None
    assert re.search(part, theirs), theirs


def test_what_zipfile_passes_over(tmp_path: Path) -> None:
    """`zipfile` passes over each of these, and torch goes by most."""
    good = good_pt()[0]
    wide, entry = good.rindex(b"PK\6\6"), good.index(b"PK\1\2")
    places = [wide + 16, wide + 32, wide + 40, wide + 56 + 8, entry + 34]
    short = pickles.pt(pickles.named(pickles.tensor()))  # without the record of 64 bits
    end = short.rindex(b"PK\5\6")
    files = [(good, at) for at in places] + [(short, end + at) for at in (4, 8, 10, 12, 16)]
    for data, at in files:
        assert both("pt", data, tmp_path)[0]
        changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        assert not both("pt", changed, tmp_path)[0], at
