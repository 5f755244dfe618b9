"""A checkpoint against the certificate beside it: which file and which tensor is not as written."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from zoo.checkpoint.ahead import prefetch
from zoo.checkpoint.certificate import Certificate, file_sha256, files_of, is_sound, sha256
from zoo.checkpoint.progress import Progress
from zoo.containers import filenames, open_checkpoint
from zoo.containers.base import Reader
from zoo.containers.errors import CorruptInput, UsageError, ZooError
from zoo.containers.safetensors_file import SafetensorsReader

_LARGEST = 1 << 30  # bytes of a certificate


@dataclass(frozen=True)
class Checked:
    """What was found: `damaged` has a line for each file and tensor that is not as it was written,
    and is empty where all are."""

    path: Path
    certificate: Path
    created: str  # of the certificate
    tensors: int  # of the certificate
    nbytes: int  # of the files that were hashed
    damaged: list[str] = field(default_factory=list)

    @property
    def intact(self) -> bool:
        """Whether everything is as it was written."""
        return not self.damaged

    def refuse_damage(self) -> None:
        """CorruptInput, listing it, where anything is damaged."""
        if self.damaged:
            raise CorruptInput(
                f"{self.path} is not what was written: {len(self.damaged)} "
                f"{'thing differs' if len(self.damaged) == 1 else 'things differ'}",
                "take it from a copy, or convert its source again",
                self.damaged,
            )


def check(path: Path, progress: Progress = lambda stage, done, total: None) -> Checked:
    """Read the checkpoint at `path`, and hold it against its certificate: every file as a whole,
    and where one differs, or the certificate has no hashes of files, every tensor.

    UsageError where there is no certificate; CorruptInput where it cannot be understood.
    """
    if not path.exists():
        raise UsageError(f"there is no {path}", "give the checkpoint")
    file = filenames.beside(path, filenames.CERTIFICATE)
    certificate, damaged = _read(file)
    found = {n: p for n, p in files_of(path).items() if n in certificate.files}
    total = sum(p.stat().st_size for p in found.values())
    wrong = list(_files(certificate.files, found, total, progress))
    if wrong or not certificate.files:
        wrong += _inside(path, certificate)
        wrong += _optimizer(path, certificate)
    count = sum(len(r.target) for r in certificate.tensors)
    return Checked(path, file, certificate.created, count, total, damaged + wrong)


def _read(file: Path) -> tuple[Certificate, list[str]]:
    """The certificate, and what is wrong with itself."""
    if not file.is_file():
        raise UsageError(
            f"there is no certificate {file}",
            "only what zooconvert wrote has one; `zooconvert verify` compares two checkpoints",
        )
    if file.stat().st_size > _LARGEST:
        raise CorruptInput(f"{file} has more than {_LARGEST} bytes", "take it from a copy")
    try:
        text = file.read_text()
        certificate, sound = Certificate.from_json(text, str(file)), is_sound(text)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise CorruptInput(f"{file} cannot be understood: {e}", "take it from a copy") from None
    return certificate, [] if sound else [f"{file.name}: it was changed since it was written"]


def _files(
    meant: Mapping[str, str], found: Mapping[str, Path], total: int, progress: Progress
) -> Iterator[str]:
    yield from (f"{n}: it is missing" for n in meant if n and n not in found)
    there = [n for n in meant if n in found]
    done = 0
    jobs = [functools.partial(file_sha256, found[n]) for n in there]
    for name, digest in zip(there, prefetch(jobs), strict=True):
        if digest != meant[name]:
            yield f"{name or found[name].name}: it was changed since it was written"
        done += found[name].stat().st_size
        progress("check", done, total)


def _inside(path: Path, certificate: Certificate) -> Iterator[str]:
    """The tensors that differ; why it cannot be opened, where it cannot."""
    side = "flax" if certificate.target_container in ("orbax", "msgpack") else "torch"
    hashes = {
        n: digest
        for r in certificate.tensors
        for n, digest in zip(r.target, r.target_sha256, strict=True)
    }
    try:
        with open_checkpoint(path, side) as reader:
            yield from _tensors(reader, hashes)
    except ZooError as e:
        yield e.problem


def _optimizer(path: Path, certificate: Certificate) -> Iterator[str]:
    file = files_of(path).get(filenames.OPTIMIZER)
    hashes = certificate.training.get("sha256")
    if not hashes or file is None:
        return
    try:
        with SafetensorsReader(file) as reader:
            yield from (f"{file.name}: {told}" for told in _tensors(reader, hashes))
    except ZooError as e:
        yield e.problem


def _tensors(reader: Reader, hashes: Mapping[str, str]) -> Iterator[str]:
    yield from (f"{n}: it is missing" for n in sorted(hashes.keys() - reader.tensors.keys()))
    yield from (f"{n}: it was not written" for n in sorted(reader.tensors.keys() - hashes.keys()))
    names = [n for n in hashes if n in reader.tensors]
    jobs = [_comparing(reader, n, hashes[n]) for n in names]
    for name, told in zip(names, prefetch(jobs), strict=True):
        if told:
            yield f"{name}: {told}"


def _comparing(reader: Reader, name: str, digest: str) -> Callable[[], str]:
    def compare() -> str:
        try:
            return "" if sha256(reader.read(name)) == digest else "its bytes are others"
        except ZooError as e:
            return e.problem

    return compare
