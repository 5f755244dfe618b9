"""What a checkpoint says of itself: its model, its config, and what its tensors cannot hold.

A safetensors file says it in its metadata (`zoo.model`, `zoo.layout`, `zoo.config`, ...; or
`zoo.entries`, a layout, where there is no family). A
directory has a `config.json`, whose keys are those of transformers where the family has them there,
and whose key "zoo" holds the same; a file of a container without metadata has FILE.config.json.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zoo.checkpoint import stated_layout
from zoo.checkpoint.generation import check_weights
from zoo.containers import dtypes, filenames, json_text
from zoo.containers.base import Reader, TensorInfo, as_array
from zoo.containers.committed import beside, find
from zoo.containers.errors import CorruptInput, UsageError, ZooError
from zoo.layout import Layout
from zoo.model import Config, Model, override
from zoo.registry import families

_CONFIG_MAX = 64 << 20  # bytes of a config.json: it may hold a vocabulary


@dataclass(frozen=True)
class Carried:
    """A tensor of the source that the target's tree has no place for, kept beside it.

    `data` is None where the value is the one that the layout states, else its bytes.
    """

    info: TensorInfo
    data: bytes | None = None

    def value(self) -> np.ndarray | None:
        """The tensor, where its bytes are kept."""
        if self.data is None:
            return None
        return as_array(np.frombuffer(self.data, np.uint8).copy(), self.info)


@dataclass(frozen=True)
class Label:
    """What is known of a checkpoint before its tensors are looked at; all of it may be missing."""

    model: Model | None = None
    config: Config | None = None
    unknown: frozenset[str] = frozenset()  # fields of `config` that nobody ever stated
    layout: Layout | None = None  # that came with the checkpoint, where there is no family
    carried: Mapping[str, Carried] = field(default_factory=dict)
    ties: tuple[str, ...] = ()  # tied names that the source spelled out
    hf: Mapping[str, Any] = field(default_factory=dict)  # a transformers config.json, whole
    metadata: Mapping[str, str] = field(default_factory=dict)  # of others, in a safetensors header
    source: str = ""  # where the config was read
    notices: tuple[str, ...] = ()
    dialect: str = ""  # how torch spelled the source of a Flax checkpoint, where not as we do
    problem: ZooError | None = None  # why it could not be read; for whoever needs the config
    foreign: str = ""  # what a config.json says that it is, where no family here is that

    def to_metadata(self) -> dict[str, str]:
        """The `zoo.*` keys of a safetensors header."""
        data = self._data() | ({"hf": dict(self.hf)} if self.hf else {})
        ours = {f"zoo.{k}": v if isinstance(v, str) else json.dumps(v) for k, v in data.items()}
        return dict(self.metadata) | ours

    def to_config_json(self, readable: bool = True, weights: str = "") -> str:
        """The text of a config.json that our reader takes, and transformers where nothing is
        unknown: it would fill in its defaults, and nobody would notice. `readable` False: the
        tensors have other names than it reads, and what it once wrote is only kept. `weights` is
        the fingerprint of those that it belongs to, where they are one file."""
        ours = self._data() | ({"metadata": dict(self.metadata)} if self.metadata else {})
        if self.hf and not readable:
            ours["hf"] = dict(self.hf)
        if weights:
            ours["weights"] = weights
        data = (self._hf() if readable and not self.unknown else {}) | {"zoo": ours}
        ours["sha256"] = _own_sha256(data)
        return json.dumps(data, indent=2) + "\n"

    def files(self) -> dict[str, str]:
        """Name -> text of what belongs beside the checkpoint besides a config.json."""
        return {} if self.layout is None else stated_layout.stated(self.layout)[1]

    def _hf(self) -> dict[str, Any]:
        """transformers' keys: what the source wrote, changed only where it says something else."""
        if self.model is None or self.model.to_hf is None or self.model.from_hf is None:
            return dict(self.hf)
        assert self.config is not None
        ours = self.model.to_hf(self.config)
        if not self.hf or not ours:
            return ours
        told = self.model.to_hf(self.model.from_hf(self.hf))
        names = {"model_type", "architectures", *(f.name for f in dataclasses.fields(self.config))}
        changed = {
            k: v for k, v in ours.items() if told.get(k) != v or (k not in self.hf and k in names)
        }
        return dict(self.hf) | changed

    def _data(self) -> dict[str, Any]:
        data: dict[str, Any]
        if self.layout is not None:
            data = {"entries": stated_layout.stated(self.layout)[0]}
        else:
            assert self.model is not None
            assert self.config is not None
            data = {
                "model": self.model.name,
                "layout": f"{self.model.name}/{self.model.version}",
                "config": _stated(self.config, self.unknown),
            }
            if self.unknown:
                data["unknown"] = sorted(self.unknown)
        if self.carried:
            data["carried"] = {
                name: {"dtype": c.info.dtype, "shape": list(c.info.shape)}
                | ({} if c.data is None else {"base64": base64.b64encode(c.data).decode()})
                for name, c in sorted(self.carried.items())
            }
        if self.ties:
            data["ties"] = sorted(self.ties)
        if self.dialect:
            data["dialect"] = self.dialect
        return data


def read_label(reader: Reader) -> Label:
    """The label of an open checkpoint. What cannot be understood is its `problem`: it matters to
    those who need the config, and a config that the user gives takes its place."""
    foreign = {k: v for k, v in reader.metadata.items() if k != "format" and k[:4] != "zoo."}
    try:
        label = _read_label(reader)
    except ZooError as e:
        label = Label(problem=e)
    return dataclasses.replace(label, metadata=dict(label.metadata) | foreign)


def _read_label(reader: Reader) -> Label:
    if "zoo.model" in reader.metadata or "zoo.entries" in reader.metadata:
        data: dict[str, Any] = {
            key.removeprefix("zoo."): value
            for key, value in reader.metadata.items()
            if key.startswith("zoo.")
        }
        source = f"{reader.path}'s metadata"
        try:
            data |= {
                k: json_text.parse(data[k])
                for k in ("config", "carried", "ties", "hf", "entries", "unknown")
                if k in data
            }
        except ValueError as e:
            raise _bad(source, str(e)) from None
        if not isinstance(hf := data.get("hf", {}), dict):
            raise _bad(source, "hf is not a JSON object")
        return dataclasses.replace(_from_zoo(data, source, reader.path), hf=hf)
    for path in config_files(reader.path):
        if path.is_file():
            return read_config_file(path, reader.path)
    return Label()


def read_config_file(path: Path, weights: Path | None = None) -> Label:
    """The label in a config.json, of transformers' or of ours. ZooError where it names other
    weights than those at `weights`."""
    try:
        data = json_text.read(path, _CONFIG_MAX)
        if not isinstance(data, dict):
            raise ValueError("not a JSON object")
        if not isinstance(data.get("model_type"), str | None):
            raise ValueError(f"model_type is {data['model_type']!r}, which is not text")
    except ValueError as e:
        raise _bad(str(path), str(e)) from None
    if isinstance(data.get("zoo"), dict):
        label = _from_zoo(data["zoo"], str(path), path if weights is None else weights)
        if weights is not None:
            check_weights(data["zoo"].get("weights"), path, weights)
        changed = data["zoo"].get("sha256") not in (None, _own_sha256(data))
        notices = (f"{path} was changed since it was written; it is used as it is",) * changed
        kept = data["zoo"].get("hf", {k: v for k, v in data.items() if k != "zoo"})
        kept = kept if isinstance(kept, dict) else {}
        return dataclasses.replace(label, hf=kept, notices=(*label.notices, *notices))
    stated, classes = data.get("model_type"), _class_names(data)
    for model in families().values():
        ours = model.hf_type == stated if stated else bool(model.hf_classes & set(classes))
        if ours and model.hf_type and model.from_hf:
            try:
                config = override(model.from_hf(data), {})
            except UsageError as e:
                raise _bad(str(path), e.problem) from None
            except (TypeError, ArithmeticError) as e:
                raise _bad(str(path), f"it describes an impossible {model.name}: {e}") from None
            except ValueError as e:
                raise UsageError(
                    f"{path} describes a {model.name} that is not in the zoo: {e}",
                    "convert another checkpoint, or say what this one is with --config",
                ) from None
            return Label(
                model,
                config,
                hf=data,
                source=str(path),
                notices=_classes(path, model, config, data),
            )
    if stated in families():  # of a family that transformers does not have so
        return Label(families()[stated], source=str(path))
    if told := stated or ", ".join(classes):
        return Label(source=str(path), foreign=str(told))
    return Label()


def _class_names(data: Mapping[str, Any]) -> list[str]:
    """The classes that a config.json names."""
    named = data.get("architectures")
    return [str(n) for n in named] if isinstance(named, list) else []


def _classes(path: Path, model: Model, config: Config, data: Mapping[str, Any]) -> tuple[str, ...]:
    """A notice where the file names a class that the family does not have."""
    named = _class_names(data)
    read_as = model.to_hf(config).get("architectures") if model.to_hf else None
    if not named or named == read_as:
        return ()
    return (f"{path} is of {', '.join(named)}, read as {', '.join(read_as or ())}",)


def config_files(path: Path) -> list[Path]:
    """Where the config of a checkpoint may lie, best first."""
    if find(path).is_dir():
        return [path / filenames.CONFIG]
    return [beside(path, filenames.CONFIG), path.with_name(filenames.CONFIG)]


def _own_sha256(data: Mapping[str, Any]) -> str:
    """Of what a config.json of ours says, the hash itself aside, however it is laid out."""
    ours = {k: v for k, v in data["zoo"].items() if k != "sha256"}
    try:
        text = json.dumps({**data, "zoo": ours}, sort_keys=True)
    except RecursionError:
        return ""
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def _from_zoo(data: Mapping[str, Any], source: str, where: Path) -> Label:
    """The label in our own keys. `where` is the checkpoint, or a file in it: where to find what
    the keys name."""
    try:
        if "entries" in data and "model" not in data:
            layout = stated_layout.read(data["entries"], source, where)
            return Label(layout=layout, **_besides_config(data), source=source)
        name = data["model"]
        model = families().get(name)
        if model is None:
            raise UsageError(
                f"{source} names the model {name!r}, which is not installed",
                "install the package that provides it, or name another with --model",
            )
        version = int(str(data.get("layout", f"{name}/{model.version}")).rpartition("/")[2])
        if version > model.version:
            raise UsageError(
                f"{source} has layout {name}/{version}, this version knows {model.version}",
                "upgrade zooconvert",
            )
        fields = dict(data["config"])
        listed = frozenset(map(str, data.get("unknown", ()))) & model.unknown
        # Earlier versions wrote null instead of a list.
        unknown = listed | {k for k, v in fields.items() if v is None and k in model.unknown}
        known = {k: v for k, v in fields.items() if k not in unknown}
        try:
            config = override(model.config(), {**model.placeholders, **known})
        except UsageError as e:
            raise _bad(source, e.problem) from None
        return Label(model, config, unknown, **_besides_config(data), source=source)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise _bad(source, f"{type(e).__name__}: {e}") from None


def _stated(config: Config, unknown: frozenset[str]) -> dict[str, Any]:
    """The fields as data. Not those that nobody stated, nor a None that is the default."""
    data = dataclasses.asdict(config)
    absent = {f.name for f in dataclasses.fields(config) if f.default is data[f.name] is None}
    return {k: v for k, v in data.items() if k not in absent | unknown}


def _besides_config(data: Mapping[str, Any]) -> dict[str, Any]:
    """What a label keeps whatever the model is."""
    return {
        "carried": {n: _carried(c) for n, c in data.get("carried", {}).items()},
        "ties": tuple(data.get("ties", ())),
        "dialect": str(data.get("dialect", "")),
        "metadata": {str(k): str(v) for k, v in dict(data.get("metadata", {})).items()},
    }


def _carried(item: Mapping[str, Any]) -> Carried:
    info = TensorInfo(item["dtype"], tuple(int(n) for n in item["shape"]))
    data = base64.b64decode(item["base64"], validate=True) if "base64" in item else None
    if info.dtype not in dtypes.NUMPY or (data is not None and len(data) != info.nbytes):
        raise ValueError(f"carried tensor of {info.dtype} {info.shape} does not fit its data")
    return Carried(info, data)


def _bad(source: str, why: str) -> CorruptInput:
    return CorruptInput(
        f"{source} cannot be understood: {why}",
        "mend or remove it, and say what it is with --model or --config",
    )
