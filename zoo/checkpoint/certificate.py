"""What was converted, from what, with which hashes, and what was verified: the proof that stays."""

from __future__ import annotations

import hashlib
import html
import json
import platform
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from zoo.checkpoint.hashes import rest
from zoo.containers import filenames, json_text
from zoo.containers.base import Reader
from zoo.containers.committed import beside, find
from zoo.containers.errors import printable
from zoo.containers.spans import SpanReader

FORMAT = 2  # of the JSON; docs/containers.md describes it
_EARLIER = {"source_sha256": "source_hashes", "target_sha256": "target_hashes"}  # of format 1


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor of the target, or of the source where the target has no place for it."""

    names: list[str]  # canonical
    source: list[str]
    target: list[str]
    op: str  # "copy", "permute(1,0)", "carried", "tied", "made"
    dtype: str  # code in the source
    target_dtype: str
    source_hashes: list[str]  # of each tensor: see `zoo.checkpoint.hashes`; none without them
    target_hashes: list[str]


@dataclass
class Certificate:
    """A finished conversion."""

    source: str
    source_container: str
    source_tree: str
    target: str
    target_container: str
    target_tree: str
    model: str  # "" where there is no family
    layout: str  # "bert/1", or "entries/sha256:..." of a layout that came with the checkpoint
    config: dict[str, Any]  # null where the checkpoint does not tell
    tensors: list[TensorRecord] = field(default_factory=list)
    verified: dict[str, Any] = field(default_factory=lambda: {"level": "none"})
    # What is in optimizer.safetensors, if there is one: see `convert.training_state.summary`.
    training: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    # Of each file of the target, and of those that belong to it (see `files_of`), the hash of what
    # is in no tensor; in format 1, of the whole file.
    files: dict[str, str] = field(default_factory=dict)
    weights: str = ""  # of one file: its `zoo.checkpoint.generation.fingerprint`
    # The kind of all hashes but the certificate's own: "blake3", "sha256", or "" for none.
    hash: str = ""
    format: int = FORMAT

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that were compared."""
        return int(self.verified.get("bytes", 0))

    def to_json(self) -> str:
        """The text of certificate.json, with its own hash at the end."""
        data = asdict(self)
        return _text(data | {"sha256": _own_sha256(data)})

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        told = {
            "converted": f"{self.source} ({self.source_container})",
            "to": f"{self.target} ({self.target_container})",
            "model": self.model or self.layout,
            "tensors": f"{len(self.tensors):,}",
            "verified": ", ".join(f"{k} {v}" for k, v in self.verified.items()),
            "made": self.created,
        }
        cells = {name: html.escape(printable(value)) for name, value in told.items()}
        rows = (f"<tr><th>{name}</th><td>{cell}</td></tr>" for name, cell in cells.items())
        return f"<table>{''.join(rows)}</table>"

    @classmethod
    def read(cls, path: Path) -> Certificate:
        """The certificate in a file; ValueError if it is none of this format."""
        return cls.from_json(path.read_text(), str(path))

    @classmethod
    def from_json(cls, text: str, source: str) -> Certificate:
        """The certificate that `to_json` gave; ValueError, which names `source`, for another."""
        return cls._from_data(json_text.parse(text), source)

    @classmethod
    def checked(cls, text: str, source: str) -> tuple[Certificate, bool]:
        """The same; and whether it says what it was written to say, by its own hash, which earlier
        versions had not."""
        data = json_text.parse(text)
        digest = data.pop("sha256", None) if isinstance(data, dict) else None
        sound = digest is None or digest == _own_sha256(data)
        return cls._from_data(data, source), sound

    @classmethod
    def _from_data(cls, data: Any, source: str) -> Certificate:
        if not isinstance(data, dict) or data.get("format") not in (1, FORMAT):
            raise ValueError(f"{source} is not a certificate of format 1 to {FORMAT}")
        data.pop("sha256", None)
        try:
            if data["format"] == 1:
                data["hash"] = "sha256"
                if training := data.get("training"):
                    training["hashes"] = training.pop("sha256", {})
            if data["hash"] not in ("blake3", "sha256", ""):
                raise ValueError(f"{source} has hashes of the kind {data['hash']!r}")
            records = ({_EARLIER.get(k, k): v for k, v in t.items()} for t in data["tensors"])
            found = cls(**data | {"tensors": [TensorRecord(**record) for record in records]})
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{source}: {e}") from None
        if wrong := _wrong(found):
            raise ValueError(f"{source}: {wrong} is not what a certificate has there")
        return found


def _wrong(found: Certificate) -> str:
    """The first field that is not of its type, or nothing."""
    hashes = found.training.get("hashes", {}) if isinstance(found.training, dict) else None
    texts = {"files": found.files, "training": hashes, "versions": found.versions}
    for name, value in texts.items():
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            return name
    kinds = {"str": str, "int": int, "list": list, "dict": dict}
    for f in fields(found):
        if not isinstance(getattr(found, f.name), kinds[str(f.type).partition("[")[0]]):
            return f.name
    for record in found.tensors:
        lists = record.names, record.source, record.target
        digests = record.source_hashes, record.target_hashes
        words = record.op, record.dtype, record.target_dtype
        if not all(isinstance(x, list) for x in (*lists, *digests)) or not all(
            isinstance(x, str) for part in (*lists, *digests, words) for x in part
        ):
            return "tensors"
        if found.hash and len(record.target) != len(record.target_hashes):
            return "target_hashes"
    return ""


def versions() -> dict[str, str]:
    """Of this package, Python, and every framework that took part (was imported)."""
    kernel = f"{platform.system()}-{platform.release()}-{platform.machine()}"  # no other process
    found = {"python": platform.python_version(), "platform": kernel}
    for package in ("zooconvert", "numpy", "torch", "jax", "flax", "tensorstore"):
        if package == "zooconvert" or package in sys.modules:
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                found[package] = "not installed as a package"
    return found


def files_of(checkpoint: Path) -> dict[str, Path]:
    """The files of a checkpoint and those that belong to it, the certificate aside: "config.json",
    "d/0123"; a checkpoint that is one file is ""."""
    where = find(checkpoint)
    if where.is_dir():
        found = {str(p.relative_to(checkpoint)): p for p in sorted(checkpoint.rglob("*"))}
    else:
        layouts = [p for p in checkpoint.parent.iterdir() if filenames.is_layout(p.name)]
        front = f"{checkpoint.name}."
        siblings = checkpoint.parent.iterdir() if checkpoint.suffix == filenames.ONNX else ()
        data = [p for p in siblings if filenames.is_onnx_data(p.name, checkpoint.name)]
        every = [beside(checkpoint, n) for n in (filenames.CONFIG, filenames.OPTIMIZER)]
        every += [*layouts, *data]
        found = {"": where} | {p.name.removeprefix(front): p for p in every}
    return {n: p for n, p in found.items() if p.is_file() and n != filenames.CERTIFICATE}


def file_sha256(path: Path) -> str:
    """Of a whole file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def rests(checkpoint: Path, kind: str, readers: Iterable[Reader]) -> dict[str, str]:
    """Of each of the checkpoint's files the hash of what is in no tensor of these readers."""
    spans: dict[Path, list[tuple[int, int]]] = {}
    for reader in readers:
        if isinstance(reader, SpanReader):
            for path, offset, nbytes in reader.stretches():
                spans.setdefault(find(path), []).append((offset, nbytes))
    return {n: rest(kind, p, spans.get(p, ())) for n, p in files_of(checkpoint).items()}


def _own_sha256(data: dict[str, Any]) -> str:
    return hashlib.sha256(_text(data).encode()).hexdigest()


def _text(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=1) + "\n"


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
