"""What a fuzzer feeds: every reader of files from anywhere, given bytes; and plain mutations.

Whatever the bytes, a reader gives tensors or a ZooError; `scripts/fuzz` looks for others with
coverage, `tests/test_fuzz.py` with a few seeded mutations of the corpus that it kept.
"""

from __future__ import annotations

import contextlib
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from zoo.checkpoint.certificate import Certificate
from zoo.checkpoint.identification import identify_header
from zoo.checkpoint.intact import check
from zoo.checkpoint.label import read_label
from zoo.containers import committed, open_checkpoint
from zoo.containers.base import Reader, TensorInfo
from zoo.containers.errors import ZooError

CORPUS = Path(__file__).parent / "data" / "fuzz"
_LONGEST = 50_000  # characters of an error
_MOST = 1 << 22  # bytes of tensors that are read: a few bytes may claim many
Target = Callable[[bytes, Path], None]


def read_all(path: Path) -> None:
    """Open a checkpoint, and read what it has."""
    with open_checkpoint(path) as reader:
        if sum(t.nbytes for t in reader.tensors.values()) < _MOST:
            for name in reader.tensors:
                reader.read(name)


def _file(name: str) -> Target:
    def target(data: bytes, folder: Path) -> None:
        path = folder / name
        path.write_bytes(data)
        read_all(path)

    return target


def _orbax(data: bytes, folder: Path) -> None:
    """The tree, and after a line of its own the header of an array."""
    tree, _, header = data.partition(b"\n--\n")
    root = folder / "c"
    (root / "a").mkdir(parents=True, exist_ok=True)
    (root / "_METADATA").write_bytes(tree)
    for name in (".zarray", "zarr.json"):
        (root / "a" / name).write_bytes(header)
    for chunk in ("0", "c.0"):
        (root / "a" / chunk).write_bytes(bytes(16))
    with open_checkpoint(root):
        pass  # reading is TensorStore's, and its own fuzzers'


def _index(data: bytes, folder: Path) -> None:
    _shard(folder / "s.safetensors")
    (folder / "m.index.json").write_bytes(data)
    read_all(folder / "m.index.json")


def _config(data: bytes, folder: Path) -> None:
    path = _shard(folder / "a.safetensors")
    (folder / "a.safetensors.config.json").write_bytes(data)
    with open_checkpoint(path) as reader:
        _identify(reader)


def _label(data: bytes, folder: Path) -> None:
    """Metadata as JSON; what is no text is JSON within it."""
    try:
        told = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(told, dict):
        metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in told.items()}
        tensors = {"fc1.weight": TensorInfo("F32", (2, 2)), "fc1.bias": TensorInfo("F32", (2,))}
        made = SimpleNamespace(metadata=metadata, tensors=tensors, path=folder / "a", container="x")
        _identify(cast(Reader, made))


def _identify(reader: Reader) -> None:
    label = read_label(reader)
    if label.problem is None:
        identify_header(reader.tensors, label)


def _certificate(data: bytes, folder: Path) -> None:
    path = _shard(folder / "a.safetensors")
    (folder / "a.safetensors.certificate.json").write_bytes(data)
    with contextlib.suppress(ValueError):
        Certificate.checked(data.decode(), "it")
    check(path)


def _journal(data: bytes, folder: Path) -> None:
    place = committed.place(folder / "b")
    place.mkdir(exist_ok=True)
    (place / committed.JOURNAL).write_bytes(data)
    committed.find(folder / "b")


def _shard(path: Path) -> Path:
    from hostile.stated import weights

    return path if path.is_file() else weights(path)


TARGETS: dict[str, Target] = {
    "safetensors": _file("a.safetensors"),
    "pt": _file("a.pt"),
    "msgpack": _file("a.msgpack"),
    "onnx": _file("a.onnx"),
    "orbax": _orbax,
    "index": _index,
    "config": _config,
    "label": _label,
    "certificate": _certificate,
    "journal": _journal,
}


def run(reader: str, data: bytes, folder: Path) -> bool:
    """Whether a reader took the bytes; anything but a ZooError is raised."""
    try:
        TARGETS[reader](data, folder)
    except ZooError as e:
        if len(str(e)) > _LONGEST:
            raise RuntimeError("an endless error") from e
        return False
    return True


def corpus(reader: str) -> list[bytes]:
    """The inputs that were kept."""
    with zipfile.ZipFile(CORPUS / f"{reader}.zip") as kept:
        return [kept.read(name) for name in sorted(kept.namelist())]


def mutated(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """A few plain changes: flips, cuts, repeats, numbers at their limits, parts of another."""
    made = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(made) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(made):
            made[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del made[at : at + rng.randint(1, 8)]
        elif kind == 2:
            made[at:at] = made[at : at + rng.randint(1, 16)]
        elif kind == 3:
            made[at : at + 1] = rng.choice(_ODD)
        elif kind == 4:
            other: Any = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            made[at : at + rng.randint(0, 8)] = other[start : start + rng.randint(1, 32)]
        else:
            made[at : at + 4] = rng.choice((b"\xff" * 4, bytes(4), b"\0\0\0\x80"))
    return bytes(made)


_ODD = (b"-1", b"0", b"1e999", b"null", b"[]", b"{}", b'""', b"\xff", b"9" * 20, b"\\u0000", b"..")
