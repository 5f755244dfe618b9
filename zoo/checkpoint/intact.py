"""A checkpoint against the certificate beside it: which file and which tensor is not as written."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from zoo.checkpoint.ahead import prefetch
from zoo.checkpoint.certificate import Certificate, file_sha256, files_of, rests
from zoo.checkpoint.hashes import HashTree, hasher
from zoo.checkpoint.progress import Progress
from zoo.checkpoint.reading import hashed
from zoo.checkpoint.slabs import COPIED, contiguous, default_workers
from zoo.containers import filenames, open_checkpoint
from zoo.containers.base import Reader
from zoo.containers.committed import beside, find
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
    """Read the checkpoint at `path`, and hold it against its certificate: every tensor, and what
    else each file holds. A certificate of format 1 has hashes of whole files: where all are as they
    were, they suffice.

    UsageError where there is no certificate, or one without hashes; CorruptInput where it cannot be
    understood; MissingExtra where it has BLAKE3 hashes, and that is not installed.
    """
    if not find(path).exists():
        raise UsageError(f"there is no {path}", "give the checkpoint")
    file = beside(path, filenames.CERTIFICATE)
    certificate, damaged = _read(file)
    if not certificate.hash:
        raise UsageError(
            f"{file} has no hashes: it was written with --no-verify",
            "convert the source again without it, or compare the two: `zooconvert verify`",
        )
    hasher(certificate.hash)
    found = {n: p for n, p in files_of(path).items() if n in certificate.files}
    total = sum(p.stat().st_size for p in found.values())
    damaged += [f"{n}: it is missing" for n in certificate.files if n and n not in found]
    damaged += (_by_files if certificate.format == 1 else _by_tensors)(
        path, certificate, lambda done: progress("check", done, total)
    )
    count = sum(len(r.target) for r in certificate.tensors)
    return Checked(path, file, certificate.created, count, total, damaged)


def _by_tensors(path: Path, certificate: Certificate, progress: Callable[[int], None]) -> list[str]:
    """What differs: tensors, and the rest of each file."""
    wrong: list[str] = []
    with ExitStack() as stack:
        readers: list[Reader] = []
        for where, hashes, prefix in _parts(path, certificate):
            try:
                reader = stack.enter_context(
                    open_checkpoint(path, _side(certificate))
                    if where is None
                    else SafetensorsReader(where)
                )
            except ZooError as e:
                wrong.append(e.problem)
                continue
            if reader.container == "onnx":
                _weights_only(reader, hashes)
            readers.append(reader)
            wrong += [prefix + told for told in _tensors(reader, hashes, certificate, progress)]
        rest = rests(path, certificate.hash, readers)
    meant = certificate.files
    changed = [n for n in meant if n in rest and rest[n] != meant[n]]
    return [f"{n or path.name}: it was changed since it was written" for n in changed] + wrong


def _weights_only(reader: Reader, names: Iterable[str]) -> None:
    """Leave aside the tensors of a graph that are no weights."""
    from zoo.containers.onnx_graph import OnnxReader

    assert isinstance(reader, OnnxReader)
    reader.present_stored(names)


def _by_files(path: Path, certificate: Certificate, progress: Callable[[int], None]) -> list[str]:
    """What differs, by hashes of whole files; and where one does, or there are none, by tensors."""
    found = files_of(path)
    there = [n for n in certificate.files if n in found]
    wrong, done = [], 0
    jobs = [functools.partial(file_sha256, found[n]) for n in there]
    for name, digest in zip(there, prefetch(jobs, default_workers()), strict=True):
        if digest != certificate.files[name]:
            wrong.append(f"{name or found[name].name}: it was changed since it was written")
        done += found[name].stat().st_size
        progress(done)
    if wrong or not certificate.files or not certificate.files.keys() <= found.keys():
        inside = dataclasses.replace(certificate, files={})
        wrong += _by_tensors(path, inside, progress)
    return wrong


def _parts(
    path: Path, certificate: Certificate
) -> Iterator[tuple[Path | None, dict[str, str], str]]:
    """The weights (None) and the optimizer: the hashes of their tensors, and how they are told."""
    pairs = [zip(r.target, r.target_hashes, strict=True) for r in certificate.tensors]
    yield None, {n: digest for record in pairs for n, digest in record}, ""
    moments = certificate.training.get("hashes")
    file = files_of(path).get(filenames.OPTIMIZER)
    if moments and file is not None:
        yield file, moments, f"{file.name}: "


def _side(certificate: Certificate) -> str:
    return "flax" if certificate.target_container in ("orbax", "msgpack") else "torch"


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
        certificate, sound = Certificate.checked(text, str(file))
    except ValueError as e:
        raise CorruptInput(f"{file} cannot be understood: {e}", "take it from a copy") from None
    return certificate, [] if sound else [f"{file.name}: it was changed since it was written"]


def _tensors(
    reader: Reader,
    meant: Mapping[str, str],
    certificate: Certificate,
    progress: Callable[[int], None],
) -> Iterator[str]:
    """The tensors that differ, and how."""
    yield from (f"{n}: it is missing" for n in sorted(meant.keys() - reader.tensors.keys()))
    yield from (f"{n}: it was not written" for n in sorted(reader.tensors.keys() - meant.keys()))
    names = [n for n in meant if n in reader.tensors]
    find = _plain_hashes if certificate.format == 1 else _tree_hashes
    for name, digest, error in find(reader, names, certificate.hash, progress):
        if error is not None:
            yield f"{name}: {error.problem}"
        elif digest != meant[name]:
            yield f"{name}: its bytes are others"


_Hashes = Iterator[tuple[str, str, ZooError | None]]


def _tree_hashes(
    reader: Reader, names: Sequence[str], kind: str, progress: Callable[[int], None]
) -> _Hashes:
    """Of each tensor the hash, or why it cannot be read."""
    trees = {n: HashTree(kind, reader.tensors[n]) for n in names}
    failed: dict[str, ZooError] = {}
    done = 0
    workers = default_workers() + 1  # the disk makes them wait
    for name, nbytes, error in hashed(reader, trees, workers):
        if error is not None:
            failed.setdefault(name, error)
        done += nbytes
        progress(done)
    for name, tree in trees.items():
        yield (name, "", failed[name]) if name in failed else (name, tree.hexdigest(), None)


def _plain_hashes(
    reader: Reader, names: Sequence[str], kind: str, progress: Callable[[int], None]
) -> _Hashes:
    """The same as format 1 has it: of the tensor's bytes from first to last."""

    def of(name: str) -> tuple[str, str, ZooError | None]:
        made = hasher(kind)
        try:
            for region in contiguous(reader.tensors[name], COPIED):
                made.update(reader.read(name, region).tobytes())
        except ZooError as e:
            return name, "", e
        return name, made.hexdigest(), None

    return prefetch([functools.partial(of, n) for n in names], default_workers())
