"""A checkpoint as a small wheel: a colleague installs it with pip and loads it by name.

The wheel holds one package with the weights in the canonical layout, their card and the certificate
of the conversion, and declares an entry point of group `zooconvert.weights`. It is written here and
not by a build tool, so that packing needs no network. Format: the binary distribution specification
of the Python packaging authority (wheel 1.0).
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import zoo
from convert.engine.commit import check_space
from convert.engine.execute import run
from convert.engine.prepare import Prepared, disk_needed
from convert.engine.targets import Target
from convert.engine.workplace import scratch
from convert.training_state.state import TrainingState
from zoo import hub, registry
from zoo.card import LARGEST, Card
from zoo.checkpoint.certificate import file_sha256, now, versions
from zoo.checkpoint.label import read_label
from zoo.checkpoint.plan import Plan, make_plan
from zoo.checkpoint.progress import Progress
from zoo.checkpoint.readings import title
from zoo.checkpoint.request import make_request
from zoo.containers import filenames, json_text, open_checkpoint
from zoo.containers.dtypes import dtype_code
from zoo.containers.errors import UsageError
from zoo.layout import TREES

_NAME = re.compile(r"[a-z0-9][a-z0-9_]*(\.[a-z0-9][a-z0-9_]*)?")
_VERSION = re.compile(r"[0-9]+(\.[0-9]+)*((a|b|rc)[0-9]+)?(\.post[0-9]+)?(\.dev[0-9]+)?")  # PEP 440
_TIME = (1980, 1, 1, 0, 0, 0)  # of every file in the zip: equal inputs give equal bytes
_CHUNK = 1 << 20


class Packed(NamedTuple):
    """A finished wheel."""

    path: Path
    name: str  # what to load
    distribution: str  # what to uninstall
    title: str  # of the model
    nbytes: int  # of its tensors
    card: Card


def pack(
    source: str | os.PathLike[str],
    name: str,
    out: str | os.PathLike[str] = ".",
    *,
    version: str = "1.0",
    card: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    model: str | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    prefix: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> Packed:
    """Write a wheel into the directory `out` with which `zoo.load(name, framework=...)` works.

    `name` is `preset.tag` of the preset that the checkpoint is, or any new name. `card` is a JSON
    file or a mapping with fields of `zoo.card.Card` (data, license, score, ...). `model`, `config`
    and `prefix` are as in `convert.convert`. `dtype` casts floating-point weights. The weights are
    verified bit for bit. Raises ZooError.
    """
    _check_names(name, version)
    told = _read_card(card)
    directory = Path(out)
    if not directory.is_dir():
        raise UsageError(f"the directory {directory} does not exist", "make it first")
    distribution = f"zooconvert_weights_{re.sub(r'[._]+', '_', name)}"
    wheel = directory / f"{distribution}-{version}-py3-none-any.whl"
    if wheel.exists() and not force:
        raise UsageError(f"{wheel} exists already", "replace it with --force, or name another")
    request = make_request(model, config, prefix=prefix)
    with (
        open_checkpoint(hub.locate(source)) as reader,
        scratch(Path(tempfile.mkdtemp(prefix=".zooconvert-pack-", dir=directory))) as place,
    ):
        code = None if dtype is None else dtype_code(dtype)
        plan = make_plan(
            reader, read_label(reader), "torch", request=request, sources=TREES, dtype=code
        )
        _check_plan(plan, name)
        target = Target(place / f"{name}.safetensors", "safetensors", False)
        nothing = TrainingState()
        check_space(place, 2 * disk_needed(plan, target, nothing))
        prepared = Prepared(reader, plan, target, nothing, "bits", True, force=False, notices=[])
        certificate = run(prepared, progress=progress)
        full = dataclasses.replace(
            told,
            name=name,
            summary=told.summary or f"{title(plan.model, plan.config, plan.unknown)}, {name}",
            sha256=file_sha256(target.path),
            created=told.created or now(),
            versions=told.versions or versions(),
        )
        (place / f"{name}.json").write_text(full.to_json())
        made = place / wheel.name
        _write_wheel(made, place, distribution, version, name, full)
        os.replace(made, wheel)
    what = title(plan.model, plan.config, plan.unknown)
    return Packed(wheel, name, distribution.replace("_", "-"), what, certificate.nbytes, full)


def _check_names(name: str, version: str) -> None:
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be the name of weights",
            "use small letters, digits and _, as in my_digits or mnist_cnn.my_digits",
        )
    if not _VERSION.fullmatch(version):
        raise UsageError(f"{version!r} is not a version", "write one such as 1.0 or 2.1.post1")
    home = hub.pretrained().get(name)
    if home is not None and home.is_relative_to(Path(zoo.__file__).parent):
        raise UsageError(
            f"{name!r} is the name of weights that come with zooconvert",
            f"give another tag: {name.partition('.')[0]}.my_data",
        )
    if "." not in name and (name in registry.names() or name in registry.families()):
        raise UsageError(f"{name!r} is a model's own name", f"add a tag: {name}.my_data")


def _check_plan(plan: Plan, name: str) -> None:
    """UsageError unless a colleague can load it by this name."""
    if plan.unknown:
        unknown = ", ".join(sorted(plan.unknown))
        raise UsageError(
            f"the tensors do not tell {unknown}, and without it nobody can load them",
            "name a preset with --model, or give its config.json with --config",
        )
    preset, dot, _ = name.partition(".")
    family = plan.family
    if dot and family.presets.get(preset) != plan.config:
        fits = [n for n, c in family.presets.items() if c == plan.config]
        raise UsageError(
            f"{preset!r} is not the preset of this checkpoint, which is {family.name}"
            + (f" ({', '.join(fits)})" if fits else ", with sizes of its own"),
            f"call it {fits[0]}.{name.partition('.')[2]}" if fits else "give a name without a dot",
        )


def _read_card(card: str | os.PathLike[str] | Mapping[str, Any] | None) -> Card:
    if card is None:
        return Card("")
    if isinstance(card, Mapping):
        return Card.from_dict(dict(card), "the card")
    try:
        data = json_text.read(Path(card), LARGEST)
    except OSError as e:
        raise UsageError(f"{card}: {e.strerror}", "give a JSON file") from None
    except ValueError as e:
        raise UsageError(
            f"{card} is not JSON: {e}", "give a JSON file with the card's fields"
        ) from e
    return Card.from_dict(data, str(card))


def _write_wheel(
    path: Path, place: Path, distribution: str, version: str, name: str, card: Card
) -> None:
    info = f"{distribution}-{version}.dist-info"
    license_line = f"License: {_line(card.license)}\n" if card.license else ""
    texts = {
        f"{distribution}/__init__.py": f'"""Weights of {name} for zooconvert."""\n',
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: {distribution.replace('_', '-')}\nVersion: {version}\n"
            f"Summary: {_line(card.summary)}\n{license_line}Requires-Dist: zooconvert\n"
        ),
        f"{info}/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: zooconvert\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
        f"{info}/entry_points.txt": (
            f"[zooconvert.weights]\n{name} = {distribution}:{name}.safetensors\n"
        ),
    }
    files = (f"{name}.safetensors", f"{name}.json", f"{name}.safetensors.{filenames.CERTIFICATE}")
    record = []
    with zipfile.ZipFile(path, "w") as archive:
        for inner, text in texts.items():
            record.append(_add(archive, inner, [text.encode()]))
        for file in files:
            with (place / file).open("rb") as stream:
                record.append(_add(archive, f"{distribution}/{file}", _chunks(stream)))
        lines = [*record, f"{info}/RECORD,,"]
        _add(archive, f"{info}/RECORD", ["\n".join(lines).encode() + b"\n"])
    with path.open("rb+") as f:
        os.fsync(f.fileno())


def _add(archive: zipfile.ZipFile, inner: str, chunks: Iterable[bytes]) -> str:
    """One file into the zip; its line of RECORD. Weights hardly compress: all is stored."""
    entry = zipfile.ZipInfo(inner, _TIME)
    entry.external_attr = 0o644 << 16
    digest, size = hashlib.sha256(), 0
    with archive.open(entry, "w", force_zip64=True) as out:
        for chunk in chunks:
            out.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    encoded = base64.urlsafe_b64encode(digest.digest()).rstrip(b"=").decode()
    return f"{inner},sha256={encoded},{size}"


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK):
        yield chunk


def _line(text: str) -> str:
    return " ".join(text.split())
