"""A layout instead of a family: it converts, travels with the result, and is not trusted."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import write

import convert
import zoo
from zoo.checkpoint import budgets, stated_layout
from zoo.checkpoint.certificate import Certificate
from zoo.checkpoint.label import Label, read_label
from zoo.containers import open_checkpoint
from zoo.containers.errors import CorruptInput, UsageError, ZooError
from zoo.containers.safetensors_file import SafetensorsWriter
from zoo.layout import Constant, Entry, Layout, Tensor, constant, linear, norm, param, tie
from zoo.layout.ops import Unstack

LAYOUT = Layout(
    [
        *linear("body.up", 6, 6),
        *norm("body.norm", 6),
        Entry(
            "param",
            (Tensor("experts", (3, 2, 5)),),
            tuple(Tensor(f"experts.{i}.w", (2, 5)) for i in range(3)),
            (Unstack(0),),
        ),
        *linear("head", 6, 4, bias=False),
        tie("again", (4, 6), "head.weight"),
        constant("steps", (7,), Constant("arange", "I64", True)),
    ]
)
# container -> what else to ask for, and the suffix of the result
FLAX = [
    ("orbax", "nnx"),
    ("orbax", "linen"),
    ("msgpack", "nnx"),
    ("msgpack", "linen-compact"),
    ("safetensors", "nnx"),
]


def tensors(**changed: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {
        t.name: rng.standard_normal(t.shape).astype(np.float32)
        for e in LAYOUT.entries
        for t in e.torch
    }
    made["steps"] = np.arange(7)
    made["again"] = made["head.weight"]
    return made | changed


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(SafetensorsWriter, tmp_path / "two.safetensors", tensors(), author="me")


def same(path: Path, expected: dict[str, np.ndarray]) -> None:
    with open_checkpoint(path) as reader:
        assert set(reader.tensors) == set(expected)
        for name, array in expected.items():
            assert reader.read(name).tobytes() == array.tobytes(), name


@pytest.mark.parametrize(("to", "tree"), FLAX)
@pytest.mark.parametrize("large", [False, True])
def test_there_and_back_without_a_flag(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, tree: Any, large: bool
) -> None:
    if large:
        monkeypatch.setattr(stated_layout, "INLINE_MAX", 10)
    there = tmp_path / "there" / ("w" if to == "orbax" else f"w.{to}")
    there.parent.mkdir()
    made = convert.convert(source, there, to, framework="flax", tree=tree, layout=LAYOUT)
    assert (made.model, made.config) == ("", {})
    assert made.layout == stated_layout.identity(LAYOUT)
    assert made.layout.startswith("entries/sha256:")
    with open_checkpoint(there, "flax") as reader:
        label = read_label(reader)
        assert label.layout == LAYOUT
        assert label.metadata["author"] == "me"
        assert not any(n.startswith("again") for n in reader.tensors)
    folder = there if there.is_dir() else there.parent
    assert len(list(folder.glob("layout-*.json"))) == large
    back = convert.convert(there, tmp_path / "back.safetensors", framework="torch")
    assert (back.model, back.layout) == ("", made.layout)
    same(tmp_path / "back.safetensors", tensors())
    for other in (source, tmp_path / "back.safetensors"):  # the source itself says nothing
        report = convert.verify(other, there)
        assert (report.verdict, report.compared, report.model) == ("same", 7, "the given layout")


def test_wrappers_are_peeled_and_errors_are_listed(tmp_path: Path) -> None:
    wrapped = {f"module.{n}": a for n, a in tensors().items()}
    path = write(SafetensorsWriter, tmp_path / "ddp.safetensors", wrapped)
    convert.convert(path, tmp_path / "ddp.msgpack", layout=LAYOUT)
    wrong = tensors(**{"head.weight": np.zeros((4, 5), np.float32)})
    wrong["body.upp.bias"] = wrong.pop("body.up.bias")
    path = write(SafetensorsWriter, tmp_path / "wrong.safetensors", wrong)
    with pytest.raises(ZooError, match="are not those of the given layout: 3 differ") as told:
        convert.convert(path, tmp_path / "wrong.msgpack", layout=LAYOUT)
    assert "missing: body.up.bias 6 (nearest: body.upp.bias)" in told.value.details


def test_what_needs_a_family_says_so(source: Path, tmp_path: Path) -> None:
    convert.convert(source, tmp_path / "w.flax", layout=LAYOUT)
    with pytest.raises(UsageError, match="of no family in the zoo") as told:
        zoo.load(tmp_path / "w.flax", "flax")
    assert "your own definition" in told.value.advice
    with pytest.raises(UsageError, match="of no family in the zoo"):
        convert.verify(tmp_path / "w.flax", tmp_path / "w.flax", level="outputs")
    with pytest.raises(UsageError, match="of no family in the zoo"):
        convert.convert(source, tmp_path / "x.flax", layout=LAYOUT, level="outputs")
    assert not (tmp_path / "x.flax").exists()
    with pytest.raises(UsageError, match="give the layout, or the other two"):
        convert.convert(source, tmp_path / "x.flax", layout=LAYOUT, model="bert")
    (identity,) = zoo.identify(tmp_path / "w.flax")
    assert (identity.model, identity.config, identity.presets) == (None, None, [])


def test_inspect_shows_it(source: Path, tmp_path: Path) -> None:
    convert.convert(source, tmp_path / "w.flax", layout=LAYOUT)
    found = convert.inspect(tmp_path / "w.flax")
    assert (found.models, found.tree, found.why_not) == (["the given layout"], "nnx", None)
    assert found.layout == stated_layout.identity(LAYOUT)
    assert convert.lint(tmp_path / "w.flax").model == "the given layout"


def test_the_optimizer_comes_along(tmp_path: Path) -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Linear(6, 6)
            self.norm = torch.nn.LayerNorm(6)

    layout = Layout([*linear("body", 6, 6), *norm("norm", 6)])
    module = Two()
    optimizer = torch.optim.AdamW(module.named_parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        module.norm(module.body(torch.randn(4, 6))).square().sum().backward()
        optimizer.step()
    state = {"model": module.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "run.pt")
    made = convert.convert(tmp_path / "run.pt", tmp_path / "run.flax", layout=layout)
    assert made.training["optimizers"]
    convert.convert(tmp_path / "run.flax", tmp_path / "back.pt")
    fresh = torch.optim.AdamW(module.named_parameters(), lr=1e-3)
    convert.load_optimizer(tmp_path / "back.pt", fresh, module)
    for mine, theirs in zip(
        optimizer.state_dict()["state"].values(), fresh.state_dict()["state"].values(), strict=True
    ):
        assert torch.equal(mine["exp_avg"], theirs["exp_avg"])
        assert torch.equal(mine["exp_avg_sq"], theirs["exp_avg_sq"])


ENTRY: dict[str, Any] = {"kind": "param", "torch": {"a": [4]}, "flax": {"a": [4]}}


def entry(**changed: Any) -> list[dict[str, Any]]:
    return [{**ENTRY, **changed}]


def op(name: str, shape: list[int], to: list[list[int]], **fields: Any) -> list[dict[str, Any]]:
    flax = {f"a{i}": s for i, s in enumerate(to)}
    return entry(torch={"a": shape}, flax=flax, ops=[{"op": name, **fields}])


HOSTILE: dict[str, Any] = {
    "no list": 3,
    "null": None,
    "no entry": [3],
    "no kind": [{"torch": {"a": [4]}, "flax": {"a": [4]}}],
    "a kind that is not a text": entry(kind=[]),
    "no sides": [{"kind": "param", "torch": {}}],
    "one side": [{"kind": "param", "torch": {"a": [4]}}],
    "shape of text": entry(torch={"a": "44"}),
    "shape of floats": entry(torch={"a": [4.0]}),
    "negative": entry(torch={"a": [-4]}),
    "overflow": entry(torch={"a": [1 << 40, 1 << 40]}),
    "rank": entry(torch={"a": [1] * 65}),
    "long name": entry(torch={"a" * 5000: [4]}),
    "twice": [ENTRY, ENTRY],
    "unknown key": entry(run="rm"),
    "unknown op": entry(ops=[{"op": "eval", "code": "1"}]),
    "op without fields": entry(ops=[{"op": "permute"}]),
    "op of text": entry(ops=["permute"]),
    "ops of text": entry(ops="permute"),
    "too many ops": entry(ops=[{"op": "flip", "axes": [0]}] * 100),
    "no permutation": op("permute", [2, 2], [[2, 2]], axes=[0, 0]),
    "no order": op("reorder", [4], [[4]], axis=0, sizes=[2, 2], order=[0, 0]),
    "flipped twice": op("flip", [4], [[4]], axes=[0, 0]),
    "axis out of range": op("divide", [4], [[2], [2]], axis=9, sizes=[2, 2]),
    "negative axis": op("divide", [4], [[2], [2]], axis=-1, sizes=[2, 2]),
    "negative sizes": op("split", [4], [[2, 2]], axis=0, names=["x", "y"], sizes=[-2, -2]),
    "a stack of everything": op("unstack", [1 << 50], [[]], axis=0, groups=1),
    "no groups": op("stack", [4], [[4]], axis=0, groups=0),
    "endless groups": op("stack", [4], [[4]], axis=0, groups=1 << 60),
    "tied to nothing": [{"kind": "tie", "torch": {"b": [4]}, "tied_to": "a"}],
    "tied to itself": [{"kind": "tie", "torch": {"a": [4]}, "tied_to": "a"}],
    "tied to another shape": [ENTRY, {"kind": "tie", "torch": {"b": [2]}, "tied_to": "a"}],
    "tied by number": [ENTRY, {"kind": "tie", "torch": {"b": [4]}, "tied_to": 3}],
    "constant of what": [
        {"kind": "constant", "torch": {"c": [4]}, "constant": {"fill": "ones", "dtype": "I64"}}
    ],
    "constant dtype": [
        {
            "kind": "constant",
            "torch": {"c": [4]},
            "constant": {"fill": "zeros", "dtype": "O", "in_state_dict": True},
        }
    ],
    "count along nothing": [
        {
            "kind": "constant",
            "torch": {"c": []},
            "constant": {"fill": "arange", "dtype": "I64", "in_state_dict": True},
        }
    ],
    "endless constant": [
        {
            "kind": "constant",
            "torch": {"c": [1 << 50]},
            "constant": {"fill": "zeros", "dtype": "I64", "in_state_dict": True},
        }
    ],
    "compact names that collide": [
        {"kind": "linear", "torch": {"b": [4]}, "flax": {"m.bias": [4]}},
        {"kind": "param", "torch": {"c": [4]}, "flax": {"Dense_0.bias": [4]}},
    ],
    "no file": {"sha256": "0" * 64, "file": "layout-0000000000000000.json"},
    "a file elsewhere": {"sha256": "0" * 64, "file": "../../etc/passwd"},
    "no hash": {"file": "layout-0000000000000000.json"},
    "other types": {"sha256": 3, "file": []},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_layout_is_an_error_of_ours(tmp_path: Path, case: str) -> None:
    arrays = {"a": np.zeros(4, np.float32)}
    stated = json.dumps(HOSTILE[case])
    path = write(SafetensorsWriter, tmp_path / "a.safetensors", arrays, **{"zoo.entries": stated})
    with pytest.raises(CorruptInput):
        convert.convert(path, tmp_path / "a.msgpack")
    assert convert.inspect(path).models == []
    (tmp_path / "plain").mkdir()
    plain = write(SafetensorsWriter, tmp_path / "plain" / "model.safetensors", arrays)
    (plain.parent / "config.json").write_text(json.dumps({"zoo": {"entries": HOSTILE[case]}}))
    with pytest.raises(CorruptInput):
        convert.convert(plain.parent, tmp_path / "b.msgpack")


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "", '{"a"', "NaN"])
def test_json_that_is_none(tmp_path: Path, text: str) -> None:
    arrays = {"a": np.zeros(4, np.float32)}
    path = write(SafetensorsWriter, tmp_path / "a.safetensors", arrays, **{"zoo.entries": text})
    with pytest.raises(CorruptInput):
        convert.convert(path, tmp_path / "a.msgpack")


def test_entries_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(budgets, "ENTRIES", 1)
    with pytest.raises(CorruptInput, match="at most 1 are read"):
        stated_layout.read([ENTRY, ENTRY], "it", tmp_path)


def test_a_changed_file_is_found(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stated_layout, "INLINE_MAX", 10)
    target = tmp_path / "w.flax"
    convert.convert(source, target, layout=LAYOUT)
    (file,) = target.glob("layout-*.json")
    assert file.name[7:23] == hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    file.write_text(file.read_text().replace("head", "tail"))
    with pytest.raises(CorruptInput, match="another hash"):
        convert.convert(target, tmp_path / "back.safetensors")
    convert.convert(target, tmp_path / "back.safetensors", layout=LAYOUT)
    convert.convert(source, target, layout=LAYOUT, force=True)
    assert Certificate.read(target / "certificate.json").layout == stated_layout.identity(LAYOUT)


def test_a_family_that_is_named_wins(source: Path, tmp_path: Path) -> None:
    convert.convert(source, tmp_path / "w.flax", layout=LAYOUT)
    with pytest.raises(ZooError, match="no model in the zoo has these"):
        convert.convert(tmp_path / "w.flax", tmp_path / "back.safetensors", model="bert")


def test_the_metadata_names_no_family() -> None:
    assert set(Label(layout=LAYOUT).to_metadata()) == {"zoo.entries"}


# --- Complex numbers ---

ROTATED = Layout([*linear("up", 3, 4), param("freqs", 5, 2)])


def rotations(dtype: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    made = {"freqs": rng.standard_normal((5, 2)) + 1j * rng.standard_normal((5, 2))}
    made |= {"up.weight": rng.standard_normal((4, 3)) * (1 - 2j), "up.bias": np.full(4, -0.0 + 1j)}
    return {n: x.astype(dtype) for n, x in made.items()}


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
@pytest.mark.parametrize("to", ["orbax", "msgpack"])
def test_complex_tensors_go_there_and_back_bit_for_bit(dtype: Any, to: str, tmp_path: Path) -> None:
    given = rotations(dtype)
    source = tmp_path / "w.pt"
    torch.save({n: torch.from_numpy(x) for n, x in given.items()}, source)
    convert.convert(source, tmp_path / "flax", to, layout=ROTATED)
    convert.convert(tmp_path / "flax", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt")
    for name, x in given.items():
        assert back[name].numpy().dtype == dtype
        assert back[name].numpy().tobytes() == x.tobytes(), name


def test_safetensors_has_complex_numbers_of_64_bits_only(tmp_path: Path) -> None:
    given = rotations(np.complex64)
    write(SafetensorsWriter, tmp_path / "w.safetensors", given)
    convert.convert(tmp_path / "w.safetensors", tmp_path / "w.flax", layout=ROTATED)
    convert.convert(tmp_path / "w.flax", tmp_path / "back.safetensors")
    with open_checkpoint(tmp_path / "back.safetensors") as reader:
        assert all(reader.read(n).tobytes() == x.tobytes() for n, x in given.items())
    torch.save(
        {n: torch.from_numpy(x) for n, x in rotations(np.complex128).items()}, tmp_path / "w.pt"
    )
    convert.convert(tmp_path / "w.pt", tmp_path / "wide.msgpack", layout=ROTATED)
    with pytest.raises(UsageError) as e:
        convert.convert(tmp_path / "wide.msgpack", tmp_path / "wide.safetensors")
    assert "safetensors has no complex128: " in e.value.problem
    assert "freqs" in e.value.problem
    assert "pt" in e.value.advice
    assert not list(tmp_path.glob("wide.safetensors*"))
