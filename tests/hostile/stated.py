"""What a checkpoint says of itself, hostile: indexes, configs, labels, layouts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hostile import Cases, Make
from hostile.safetensor import ONE, raw


def weights(path: Path, metadata: dict[str, str] | None = None) -> Path:
    """A sound file of one tensor."""
    path.write_bytes(raw(({"__metadata__": metadata} if metadata else {}) | {"a.weight": ONE}))
    return path


def _inner(folder: Path) -> Path:
    """A folder that is the checkpoint."""
    (folder / "m").mkdir()
    return folder / "m"


def _index(text: bytes | str | dict[str, Any], also: bool = True) -> Make:
    def make(folder: Path) -> Path:
        if also:
            weights(folder / "s.safetensors")
        path = folder / "model.safetensors.index.json"
        told = json.dumps(text) if isinstance(text, dict) else text
        path.write_bytes(told if isinstance(told, bytes) else told.encode())
        return path

    return make


def _mapped(where: Any, **more: Any) -> Make:
    return _index({"weight_map": where} | more)


def indexes() -> Cases:
    """Indexes of sharded checkpoints."""
    itself = "model.safetensors.index.json"

    def linked(folder: Path) -> Path:
        path = _mapped({"a.weight": "link.safetensors"})(folder)
        (folder / "link.safetensors").symlink_to(folder / "link.safetensors")
        return path

    def pipe(folder: Path) -> Path:
        path = _mapped({"a.weight": "pipe.safetensors"})(folder)
        os.mkfifo(folder / "pipe.safetensors")
        return path

    def sparse(folder: Path) -> Path:
        path = folder / itself
        with path.open("wb") as f:
            f.write(b'{"weight_map": {')
            f.truncate(3 << 30)
        return path

    def folder_itself(folder: Path) -> Path:
        return _mapped({"a.weight": itself})(_inner(folder)).parent

    return {
        "names itself": _mapped({"a.weight": itself}),
        "names itself, as a folder": folder_itself,
        "up": _mapped({"a.weight": "../s.safetensors"}),
        "from the root": _mapped({"a.weight": "/etc/passwd"}),
        "a drive": _mapped({"a.weight": "C:\\s.safetensors"}),
        "a backslash": _mapped({"a.weight": "..\\s.safetensors"}),
        "NUL": _mapped({"a.weight": "s.safetensors\0"}),
        "a name of a megabyte": _mapped({"a.weight": "s" * 1_000_000}),
        "an empty name": _mapped({"a.weight": ""}),
        "a number": _mapped({"a.weight": 1}),
        "a list": _mapped([["a.weight", "s.safetensors"]]),
        "null": _mapped(None),
        "nothing": _mapped({}),
        "no map": _index({"metadata": {}}),
        "not there": _mapped({"a.weight": "t.safetensors"}),
        "100,000 that are not there": _mapped({f"t{i}": f"{i}.safetensors" for i in range(10**5)}),
        "tensors that are not there": _mapped({f"t{i}": "s.safetensors" for i in range(10**5)}),
        "a tensor too few": _mapped({"b": "s.safetensors"}),
        "a link to itself": linked,
        "a pipe": pipe,
        "deep": _index('{"weight_map":' * 50_000),
        "cut": _index('{"weight_map": {"a.weight": "s.safe'),
        "one name twice": _index(
            '{"weight_map": {"a.weight": "s.safetensors", "a.weight": "t.safetensors"}}'
        ),
        "endless digits": _index('{"weight_map": 1' + "0" * 5000 + "}"),
        "not UTF-8": _index(b'{"weight_map": {"\xff": "s.safetensors"}}'),
        "sparse, of 3 GB": sparse,
    }


def _config(text: Any) -> Make:
    def make(outer: Path) -> Path:
        folder = _inner(outer)
        weights(folder / "model.safetensors")
        told = text if isinstance(text, str | bytes) else json.dumps(text)
        (folder / "config.json").write_bytes(told if isinstance(told, bytes) else told.encode())
        return folder

    return make


def _bert(**fields: Any) -> Make:
    return _config({"model_type": "bert"} | fields)


def _sparse_config(outer: Path) -> Path:
    folder = _inner(outer)
    weights(folder / "model.safetensors")
    with (folder / "config.json").open("wb") as f:
        f.truncate(3 << 30)
    return folder


def configs() -> Cases:
    """config.json, of transformers' kind and of ours."""
    return {
        "10^9 layers": _bert(num_hidden_layers=10**9),
        "10^300 layers": _bert(num_hidden_layers=10**300),
        "10^9 layers of T5": _config({"model_type": "t5", "num_layers": 10**9}),
        "10^9 layers of Switch": _config(
            {"model_type": "switch_transformers", "num_layers": 10**9}
        ),
        "10^9 experts": _config({"model_type": "switch_transformers", "num_experts": 10**9}),
        "10^9 labels": _bert(num_labels=10**9, architectures=["BertForSequenceClassification"]),
        "10^9 of a resnet": _config({"model_type": "resnet", "depths": [10**9] * 4}),
        "a million depths": _config({"model_type": "resnet", "depths": [1] * 1_000_000}),
        "layers of minus one": _bert(num_hidden_layers=-1),
        "half a layer": _bert(num_hidden_layers=0.5),
        "layers of text": _bert(num_hidden_layers="12"),
        "a list of layers": _bert(num_hidden_layers=[12]),
        "no heads": _bert(num_attention_heads=0),
        "10^18 wide": _bert(hidden_size=10**18),
        "NaN layers": _config('{"model_type": "bert", "num_hidden_layers": NaN}'),
        "infinite layers": _config('{"model_type": "bert", "num_hidden_layers": 1e999}'),
        "endless digits": _config(
            '{"model_type": "bert", "num_hidden_layers": 1' + "0" * 5000 + "}"
        ),
        "model_type is a list": _config({"model_type": ["bert"]}),
        "model_type has ESC": _config({"model_type": "\x1b]0;x\x07"}),
        "model_type is a megabyte": _config({"model_type": "b" * 1_000_000}),
        "architectures are a map": _bert(architectures={"a": 1}),
        "architectures are lists": _bert(architectures=[["x"]] * 1000),
        "a million architectures": _config({"architectures": ["X" * 20] * 300_000}),
        "a list": _config([]),
        "text": _config("x"),
        "empty": _config(""),
        "NUL": _config(bytes(1000)),
        "not UTF-8": _config(b'{"model_type": "\xff"}'),
        "50,000 deep": _config('{"a":' * 50_000),
        "deep within": _config('{"model_type": "bert", "x": ' + "[" * 900 + "]" * 900 + "}"),
        "sparse, of 3 GB": _sparse_config,
        "zoo is a list": _config({"zoo": []}),
        "zoo is empty": _config({"zoo": {}}),
        "zoo: an unknown model": _config({"zoo": {"model": "nonesuch", "config": {}}}),
        "zoo: a model that is a list": _config({"zoo": {"model": ["mlp"], "config": {}}}),
        "zoo: a config that is a list": _config({"zoo": {"model": "mlp", "config": [1]}}),
        "zoo: other weights": _config({"zoo": {"model": "mlp", "config": {}, "weights": ["x"]}}),
        "zoo: a hash that is a map": _config({"zoo": {"model": "mlp", "config": {}, "sha256": {}}}),
    }  # fmt: skip


def _label(metadata: dict[str, Any]) -> Make:
    def make(folder: Path) -> Path:
        told = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
        return weights(folder / "a.safetensors", told)

    return make


def _ours(config: Any = None, **more: Any) -> Make:
    told = {"zoo.model": "mlp", "zoo.layout": "mlp/1", "zoo.config": config or {}}
    return _label(told | {f"zoo.{k}": v for k, v in more.items()})


def _bert_label(layers: int) -> Make:
    told = {"zoo.model": "bert", "zoo.layout": "bert/1"}
    return _label(told | {"zoo.config": json.dumps({"num_hidden_layers": layers})})


def _entries(*entries: Any) -> Make:
    return _label({"zoo.entries": list(entries)})


def _entry(**fields: Any) -> dict[str, Any]:
    one = {"kind": "linear", "torch": {"a.weight": [1]}, "flax": {"a.kernel": [1]}, "ops": []}
    return one | fields


def labels() -> Cases:
    """Metadata of our own, and layouts in it."""
    huge = {"dtype": "F32", "shape": [1 << 40]}
    return {
        "an unknown model": _label({"zoo.model": "nonesuch", "zoo.config": {}}),
        "a model's path": _label({"zoo.model": "../../evil", "zoo.config": {}}),
        "a later layout": _ours(layout="mlp/99"),
        "a layout of no number": _ours(layout="mlp/x"),
        "a layout of 5,000 digits": _ours(layout="mlp/" + "9" * 5000),
        "10^9 sizes": _ours({"sizes": [10**9] * 3}),
        "a million sizes": _ours({"sizes": [1] * 1_000_000}),
        "sizes of text": _ours({"sizes": "abc"}),
        "sizes of a number": _ours({"sizes": 7}),
        "an unknown field": _ours({"nonesuch": 1}),
        "a config that is a list": _ours([1]),
        "a config that is text": _ours("text"),
        "a config 10^5 deep": _ours("[" * 10**5 + "]" * 10**5),
        "bert of 10^9 layers": _bert_label(10**9),
        "bert of 10^6 layers": _bert_label(10**6),
        "unknown is a number": _ours(unknown=7),
        "carried: of a terabyte": _ours(carried={"x": huge}),
        "carried: bytes too few": _ours(carried={"x": huge | {"base64": "AAAA"}}),
        "carried: not base64": _ours(carried={"x": huge | {"base64": "\x1b"}}),
        "carried: a list": _ours(carried=[1]),
        "carried: a shape of text": _ours(carried={"x": {"dtype": "F32", "shape": "abc"}}),
        "ties are a number": _ours(ties=7),
        "ties are maps": _ours(ties=[{}]),
        "a million ties": _ours(ties=[f"t{i}" for i in range(10**6)]),
        "hf is a list": _ours(hf=[1]),
        "entries: text": _label({"zoo.entries": '"x"'}),
        "entries: not JSON": _label({"zoo.entries": "{"}),
        "entries: 100,000 deep": _label({"zoo.entries": "[" * 10**5}),
        "entries: a number": _entries(7),
        "entries: 300,000": _entries(*[{}] * 300_000),
        "entries: an unknown op": _entries(_entry(ops=[{"op": "system"}])),
        "entries: a permutation of one": _entries(_entry(ops=[{"op": "permute", "axes": [7]}])),
        "entries: a million axes": _entries(_entry(ops=[{"op": "permute", "axes": [0] * 10**6}])),
        "entries: a shape of 2^62": _entries(_entry(torch={"a.weight": [1 << 62, 4]})),
        "entries: a negative shape": _entries(_entry(torch={"a.weight": [-1]})),
        "entries: a name of a megabyte": _entries(_entry(torch={"a" * 10**6: [1]})),
        "entries: a constant of 2^40": _entries(_entry(torch={"x": [1 << 40]}, constant=0)),
        "entries: tied to itself": _entries(_entry(tied_to="a.weight")),
        "entries: two of one name": _entries(_entry(), _entry()),
        "entries: a file outside": _label(
            {"zoo.entries": {"file": "../layout-0123456789abcdef.json", "sha256": "0" * 64}}
        ),
        "entries: a file that is not there": _label(
            {"zoo.entries": {"file": "layout-0123456789abcdef.json", "sha256": "0" * 64}}
        ),
        "entries: 2,000 ops that unstack": _entries(
            *[_entry(ops=[{"op": "unstack", "axis": 0}])] * 2000
        ),
    }  # fmt: skip
