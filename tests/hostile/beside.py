"""What lies beside a checkpoint, hostile: certificates, journals, optimizers, cards of wheels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile import Cases, Make
from hostile.safetensor import raw

TARGET = "b.msgpack"  # where `scripts/hostile` converts the source of a journal's case to
SIZES = (2, 2, 2)


def checkpoint(path: Path) -> Path:
    """A sound mlp, which a command takes as it is."""
    shapes = {"fc1.weight": [2, 2], "fc1.bias": [2], "fc2.weight": [2, 2], "fc2.bias": [2]}
    label = {"zoo.model": "mlp", "zoo.layout": "mlp/1"}
    label["zoo.config"] = json.dumps({"sizes": SIZES})
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | label}
    at = 0
    for name, shape in shapes.items():
        n = 16 if len(shape) == 2 else 8
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + n]}
        at += n
    path.write_bytes(raw(header, bytes(at)))
    return path


def _record(**fields: Any) -> dict[str, Any]:
    one = {
        "names": ["fc1.weight"],
        "source": ["fc1.weight"],
        "target": ["fc1.weight"],
        "op": "copy",
    }
    one |= {"dtype": "F32", "target_dtype": "F32"}
    return one | {"source_hashes": ["00"], "target_hashes": ["00"]} | fields


def _certificate(**fields: Any) -> dict[str, Any]:
    told = dict.fromkeys(
        ("source", "source_container", "source_tree", "target", "target_tree"), "x"
    )
    told |= {"target_container": "safetensors", "model": "mlp", "layout": "mlp/1", "hash": "sha256"}
    return told | {"config": {}, "tensors": [_record()], "files": {"": "00"}, "format": 2} | fields


def _beside(text: Any, name: str = "certificate.json") -> Make:
    def make(folder: Path) -> Path:
        path = checkpoint(folder / "a.safetensors")
        told = text if isinstance(text, str | bytes) else json.dumps(text)
        file = folder / f"a.safetensors.{name}"
        file.write_bytes(told if isinstance(told, bytes) else told.encode())
        return path

    return make


def _sparse(name: str) -> Make:
    def make(folder: Path) -> Path:
        path = checkpoint(folder / "a.safetensors")
        with (folder / f"a.safetensors.{name}").open("wb") as f:
            f.truncate(3 << 30)
        return path

    return make


def certificates() -> Cases:
    """certificate.json: `check` reads it, `verify` shows it."""
    many = [_record(target=[f"t{i}"], target_hashes=["00"]) for i in range(100_000)]
    training = {"file": "x", "hashes": {"a": 7}}
    told: dict[str, Any] = {
        "a list": [], "text": '"x"', "empty": "", "cut": '{"format": 2',
        "not UTF-8": b"\xff\xfe", "NUL": bytes(100), "50,000 deep": '{"format":' * 50_000,
        "endless digits": '{"format": 1' + "0" * 5000 + "}",
        "format 99": _certificate(format=99), "format true": _certificate(format=True),
        "format text": _certificate(format="2"), "no tensors": {"format": 2, "hash": "sha256"},
        "tensors are a map": _certificate(tensors={}),
        "tensors are null": _certificate(tensors=None),
        "tensors are numbers": _certificate(tensors=[1]),
        "an unknown field": _certificate(nonesuch=1),
        "an unknown field of a tensor": _certificate(tensors=[_record(nonesuch=1)]),
        "an unknown hash": _certificate(hash="md5"), "a hash that is a list": _certificate(hash=[]),
        "targets are numbers": _certificate(tensors=[_record(target=[1])]),
        "targets are one text": _certificate(tensors=[_record(target="fc1.weight")]),
        "targets are null": _certificate(tensors=[_record(target=None)]),
        "hashes too few": _certificate(tensors=[_record(target_hashes=[])]),
        "hashes are numbers": _certificate(tensors=[_record(target_hashes=[0])]),
        "files are a list": _certificate(files=["x"]),
        "files outside": _certificate(files={"../../etc/passwd": "00"}),
        "files from the root": _certificate(files={"/etc/passwd": "00"}),
        "100,000 files": _certificate(files={f"f{i}": "00" for i in range(10**5)}),
        "a file named in megabytes": _certificate(files={"f" * 4_000_000: "00"}),
        "100,000 tensors that are not there": _certificate(tensors=many),
        "a container of no name": _certificate(target_container=7),
        "training is a list": _certificate(training=[1]),
        "training's hashes are numbers": _certificate(training=training),
        "weights are a map": _certificate(weights={"x": 1}),
        "notices with ESC": _certificate(notices=["\x1b[2J\x1b]0;x\x07"]),
        "model with ESC": _certificate(model="\x1b[2J", created="\x1b[2J"),
        "verified is text": _certificate(verified="all"),
        "format 1: of nothing": {"format": 1},
        "format 1: training is text": _certificate(format=1, training="x"),
        "format 1: a file that is a number": _certificate(format=1, files={"": 7}),
    }  # fmt: skip
    found: Cases = {n: _beside(x) for n, x in told.items()}
    return found | {"sparse, of 3 GB": _sparse("certificate.json")}


def _place(fill: Callable[[Path], object], kind: str = "committed") -> Make:
    """A workplace beside TARGET, as a conversion that was cut short leaves one."""

    def make(folder: Path) -> Path:
        place = folder / f".{TARGET}.zooconvert-{kind}"
        place.mkdir()
        fill(place)
        return checkpoint(folder / "a.safetensors")

    return make


def _journal(text: Any) -> Make:
    told = text if isinstance(text, str | bytes) else json.dumps(text)
    raw = told if isinstance(told, bytes) else told.encode()
    return _place(lambda place: (place / "journal.json").write_bytes(raw))


def _resumable(record: str | bytes, log: str | bytes) -> Make:
    def fill(place: Path) -> None:
        for name, told in (("resume.json", record), ("resume.log", log)):
            (place / name).write_bytes(told if isinstance(told, bytes) else told.encode())
        (place / TARGET).write_bytes(b"\x81")

    return _place(fill, "0123")


def _link(place: Path) -> None:
    (place / "journal.json").write_text(json.dumps({"files": [TARGET]}))
    (place / TARGET).symlink_to("/etc/passwd")


def _linked_place(folder: Path) -> Path:
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere/precious").write_text("x")
    (folder / f".{TARGET}.zooconvert-committed").symlink_to(folder / "elsewhere")
    return checkpoint(folder / "a.safetensors")


def _sparse_journal(place: Path) -> None:
    with (place / "journal.json").open("wb") as f:
        f.truncate(3 << 30)


def journals() -> Cases:
    """What is left beside a target: journals of a commit, records of what may be resumed."""
    return {
        "a list": _journal([]),
        "text": _journal('"x"'),
        "empty": _journal(""),
        "cut": _journal('{"files": ["b'),
        "not UTF-8": _journal(b"\xff"),
        "50,000 deep": _journal('{"files":' * 7000),
        "files are text": _journal({"files": TARGET}),
        "files are numbers": _journal({"files": [1]}),
        "files are lists": _journal({"files": [["x"]]}),
        "files are a map": _journal({"files": {TARGET: 1}}),
        "files are null": _journal({"files": None}),
        "files outside": _journal({"files": ["../precious"]}),
        "files from the root": _journal({"files": ["/etc/passwd"]}),
        "files of others": _journal({"files": ["a.safetensors"]}),
        "files that are not there": _journal({"files": [TARGET]}),
        "no files": _journal({}),
        "10^5 names": _journal({"files": [f"f{i}" for i in range(10**5)]}),
        "endless digits": _journal('{"files": 1' + "0" * 5000 + "}"),
        "a link out": _place(_link),
        "a place that is a link": _linked_place,
        "sparse, of 3 GB": _place(_sparse_journal),
        "resume: a record of nothing": _resumable("{}", ""),
        "resume: not JSON": _resumable("{", ""),
        "resume: not UTF-8": _resumable(b"\xff", b"\xff"),
        "resume: 50,000 deep": _resumable('{"a":' * 50_000, ""),
        "resume: a list": _resumable("[]", "[]\n"),
        "resume: a log of lists": _resumable("SAME", "[]\n[1]\n"),
        "resume: a log without numbers": _resumable("SAME", '{"slab": "x"}\n{}\n'),
        "resume: slabs that are not": _resumable("SAME", '{"slab": 10000}\n{"slab": -1}\n'),
        "resume: no hashes": _resumable("SAME", '{"slab": 0}\n'),
        "resume: hashes too few": _resumable(
            "SAME", '{"slab": 0, "leaves": [], "meant": [], "overflow": 0}\n'
        ),
        "resume: hashes of no number": _resumable(
            "SAME", '{"slab": 0, "leaves": ["x"], "meant": ["y"], "overflow": "z"}\n'
        ),
        "resume: wrong hashes": _resumable(
            "SAME", '{"slab": 0, "leaves": ["00"], "meant": ["00"], "overflow": 0}\n'
        ),
        "resume: a log 50,000 deep": _resumable("SAME", "[" * 50_000),
    }


def _optimizer(described: Any, training: Any = None, names: tuple[str, ...] = ()) -> Make:
    one = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    told = described if isinstance(described, str) else json.dumps(described)
    data = json.dumps({"data": {}} if training is None else training)
    metadata = {"zoo.optimizer": told, "zoo.training": data}
    header = {"__metadata__": metadata} | dict.fromkeys(names, one)
    return _beside(raw(header, b""), "optimizer.safetensors")


def _adam(**fields: Any) -> dict[str, Any]:
    one = {"name": "", "rule": "AdamW", "slots": [], "groups": [], "steps": 1}
    return {"version": 1, "optimizers": [one | fields]}


def optimizers() -> Cases:
    """optimizer.safetensors."""
    group = {"params": ["fc1.weight"], "options": {}}
    return {
        "not JSON": _optimizer("{"),
        "a list": _optimizer([]),
        "10^5 deep": _optimizer("[" * 10**5),
        "a version of text": _optimizer({"version": "x", "optimizers": []}),
        "version 99": _optimizer({"version": 99, "optimizers": []}),
        "optimizers are null": _optimizer({"version": 1, "optimizers": None}),
        "an unknown rule": _optimizer(_adam(rule="os.system")),
        "a rule that is a list": _optimizer(_adam(rule=["AdamW"])),
        "slots of text": _optimizer(_adam(slots="exp_avg")),
        "unknown slots": _optimizer(_adam(slots=["nonesuch"])),
        "slots that are lists": _optimizer(_adam(slots=[[1]])),
        "groups are numbers": _optimizer(_adam(groups=[1])),
        "params are numbers": _optimizer(_adam(groups=[{"params": 1, "options": {}}])),
        "params are lists": _optimizer(_adam(groups=[{"params": [[1]], "options": {}}])),
        "one parameter twice": _optimizer(_adam(groups=[group, group])),
        "parameters of nothing": _optimizer(
            _adam(groups=[{"params": ["nonesuch"], "options": {}}], steps={"nonesuch": 3})
        ),
        "10^5 parameters of nothing": _optimizer(
            _adam(groups=[{"params": [f"p{i}" for i in range(10**5)], "options": {}}])
        ),
        "options are a list": _optimizer(_adam(groups=[group | {"options": [1]}])),
        "steps of others": _optimizer(_adam(groups=[group], steps={"x": 1})),
        "steps negative": _optimizer(_adam(groups=[group], steps={"fc1.weight": -1})),
        "steps of text": _optimizer(_adam(groups=[group], steps="x")),
        "strange tensors": _optimizer(_adam(groups=[group]), names=("evil",)),
        "data are a list": _optimizer(_adam(groups=[group]), {"data": [1]}),
        "training is text": _optimizer(_adam(groups=[group]), "x"),
        "cut": _beside(b"\x10", "optimizer.safetensors"),
        "not safetensors": _beside(b"\x80\x02}.", "optimizer.safetensors"),
        "a header of 2^63": _beside(b"\xff" * 16, "optimizer.safetensors"),
        "sparse, of 3 GB": _sparse("optimizer.safetensors"),
    }


def _installed(card: str | bytes | dict[str, Any], **files: bytes) -> Make:
    """A wheel as pip would lay it out; the path is its weights."""

    def make(folder: Path) -> Path:
        package = folder / "site/evil_weights"
        package.mkdir(parents=True)
        told = json.dumps(card) if isinstance(card, dict) else card
        (package / "evil.json").write_bytes(told if isinstance(told, bytes) else told.encode())
        for name, data in files.items():
            (package / name).write_bytes(data)
        info = folder / "site/evil_weights-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            "[zooconvert.weights]\nevil = evil_weights:evil.safetensors\n"
        )
        (package / "__init__.py").write_text("open('canary', 'w')\n")
        return checkpoint(package / "evil.safetensors")

    return make


def _point(value: str) -> Make:
    def make(folder: Path) -> Path:
        path = _installed({"name": "evil"})(folder)
        points = folder / "site/evil_weights-1.0.dist-info/entry_points.txt"
        points.write_text(f"[zooconvert.weights]\n{value}\n")
        return path

    return make


def _sparse_card(folder: Path) -> Path:
    path = _installed({})(folder)
    with path.with_name("evil.json").open("wb") as f:
        f.truncate(3 << 30)
    return path


def cards() -> Cases:
    """Installed wheels: their cards and entry points. Their code must not be run."""
    card = {"name": "evil"}
    sound = hashlib.sha256(b"").hexdigest()
    return {
        "card: a list": _installed("[]"),
        "card: cut": _installed('{"name"'),
        "card: empty": _installed(""),
        "card: not UTF-8": _installed(b'{"name": "\xff"}'),
        "card: 50,000 deep": _installed('{"name":' * 50_000),
        "card: endless digits": _installed('{"seed": 1' + "0" * 5000 + "}"),
        "card: an unknown field": _installed(card | {"nonesuch": 1}),
        "card: a name that is a list": _installed({"name": ["x"]}),
        "card: a summary that is a map": _installed(card | {"summary": {"x": 1}}),
        "card: a summary with ESC": _installed(card | {"summary": "\x1b[2J\x1b]0;x\x07"}),
        "card: a summary of megabytes": _installed(card | {"summary": "x" * 5_000_000}),
        "card: a license with ESC": _installed(card | {"license": "\x1b[2J"}),
        "card: a score of text": _installed(card | {"score": "good"}),
        "card: a score of another kind": _installed(card | {"score": {"nonesuch": 1}}),
        "card: a score of maps": _installed(
            card | {"score": {key: {} for key in ("metric", "value", "low", "high", "n")}}
        ),
        "card: versions are a list": _installed(card | {"versions": [1]}),
        "card: another hash": _installed(card | {"sha256": sound}),
        "card: a hash that is a number": _installed(card | {"sha256": 7}),
        "card: a command that is a list": _installed(card | {"command": ["rm"]}),
        "card: sparse, of 3 GB": _sparse_card,
        "point: outside": _point("evil = evil_weights:../../../../etc/passwd"),
        "point: from the root": _point("evil = evil_weights:/etc/passwd"),
        "point: nowhere": _point("evil = evil_weights:nowhere.safetensors"),
        "point: of no package": _point("evil = nonesuch:x.safetensors"),
        "point: a dotted package": _point("evil = evil_weights.inner:x.safetensors"),
        "point: relative": _point("evil = ..evil:x.safetensors"),
        "point: without a file": _point("evil = evil_weights"),
        "point: a name with ESC": _point("\x1b[2J = evil_weights:evil.safetensors"),
    }
