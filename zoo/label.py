"""What a checkpoint says of itself: its model, its config, and what its tensors cannot hold.

A safetensors file says it in its metadata (`zoo.model`, `zoo.layout`, `zoo.config`, ...). A
directory has a `config.json`, whose keys are those of transformers where the family has them there,
and whose key "zoo" holds the same; a file of a container without metadata has FILE.config.json.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zoo.containers import dtypes
from zoo.containers.base import Reader, TensorInfo, as_array
from zoo.containers.errors import CorruptInput, UsageError
from zoo.model import Config, Model, override
from zoo.registry import families


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
    carried: Mapping[str, Carried] = field(default_factory=dict)
    ties: tuple[str, ...] = ()  # tied names that the source spelled out
    hf: Mapping[str, Any] = field(default_factory=dict)  # a transformers config.json, whole
    source: str = ""  # where it was read
    notices: tuple[str, ...] = ()

    def to_metadata(self) -> dict[str, str]:
        """The `zoo.*` keys of a safetensors header."""
        return {
            f"zoo.{key}": value if isinstance(value, str) else json.dumps(value)
            for key, value in self._data().items()
        }

    def to_config_json(self) -> str:
        """The text of a config.json that our reader and transformers both take."""
        data: dict[str, Any] = dict(self.hf)
        data.pop("zoo", None)
        if self.model and self.model.to_hf:
            hf = self.model.to_hf(self.config)
            data |= {k: None if k in self.unknown else v for k, v in hf.items()}
        return json.dumps(data | {"zoo": self._data()}, indent=2) + "\n"

    def _data(self) -> dict[str, Any]:
        assert self.model is not None
        assert self.config is not None
        config = dataclasses.asdict(self.config)
        config |= dict.fromkeys(self.unknown)
        data: dict[str, Any] = {
            "model": self.model.name,
            "layout": f"{self.model.name}/{self.model.version}",
            "config": config,
        }
        if self.carried:
            data["carried"] = {
                name: {"dtype": c.info.dtype, "shape": list(c.info.shape)}
                | ({} if c.data is None else {"base64": base64.b64encode(c.data).decode()})
                for name, c in sorted(self.carried.items())
            }
        if self.ties:
            data["ties"] = sorted(self.ties)
        return data


def read_label(reader: Reader) -> Label:
    """The label of an open checkpoint. Raises CorruptInput for one that cannot be understood."""
    if "zoo.model" in reader.metadata:
        data = {
            key.removeprefix("zoo."): value
            for key, value in reader.metadata.items()
            if key.startswith("zoo.")
        }
        source = f"{reader.path}'s metadata"
        try:
            data |= {k: json.loads(data[k]) for k in ("config", "carried", "ties") if k in data}
        except ValueError as e:
            raise _bad(source, str(e)) from None
        return _from_zoo(data, source)
    for path in _config_files(reader.path):
        if path.is_file():
            return read_config_file(path)
    return Label()


def read_config_file(path: Path) -> Label:
    """The label in a config.json, of transformers' or of ours."""
    try:
        data = json.loads(path.read_text())
        if not isinstance(data, dict):
            raise ValueError("not a JSON object")
    except (ValueError, RecursionError) as e:
        raise _bad(str(path), str(e)) from None
    if isinstance(data.get("zoo"), dict):
        label = _from_zoo(data["zoo"], str(path))
        return dataclasses.replace(label, hf={k: v for k, v in data.items() if k != "zoo"})
    for model in families().values():
        if model.hf_type == data.get("model_type") and model.hf_type and model.from_hf:
            try:
                return Label(model, model.from_hf(data), hf=data, source=str(path))
            except (TypeError, ValueError) as e:
                raise UsageError(
                    f"{path} describes a {model.name} that is not in the zoo: {e}",
                    "convert another checkpoint, or say what this one is with --config",
                ) from None
    if "model_type" in data:
        notice = f"{path} describes a {data['model_type']!r}, which the zoo does not have"
        return Label(source=str(path), notices=(f"{notice}: not used",))
    return Label()


def _config_files(path: Path) -> list[Path]:
    if path.is_dir():
        return [path / "config.json"]
    return [path.with_name(path.name + ".config.json"), path.with_name("config.json")]


def _from_zoo(data: Mapping[str, Any], source: str) -> Label:
    try:
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
        unknown = frozenset(k for k, v in fields.items() if v is None and k in model.unknown)
        config = override(model.config(), {k: v for k, v in fields.items() if k not in unknown})
        carried = {n: _carried(c) for n, c in data.get("carried", {}).items()}
        return Label(model, config, unknown, carried, tuple(data.get("ties", ())), source=source)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise _bad(source, f"{type(e).__name__}: {e}") from None


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
