"""`convert.export`: torch's graph in onnxruntime beside both twins, and the way back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from support import canonical, write
from torch import nn

import convert
from convert.cli.main import cli
from convert.compare.onnx_side import onnx_rows
from convert.compare.torch_side import TorchSide
from convert.exporting import onnx_export as exporting
from convert.exporting.onnx_proof import Held
from convert.judge.rows import Row
from convert.runtime.call import Call
from convert.runtime.onnx_session import OnnxSession
from zoo import probe
from zoo.checkpoint.label import Label
from zoo.containers import open_checkpoint
from zoo.containers.errors import NotEquivalent, UsageError
from zoo.containers.safetensors_file import SafetensorsWriter
from zoo.registry import families


def checkpoint(folder: Path, family: str, key: str) -> Path:
    model = families()[family]
    config = model.tiny[key]
    label = Label(model, config).to_metadata()
    return write_to(folder / f"{family}.safetensors", canonical(model, config), label)


def write_to(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> Path:
    write(SafetensorsWriter, path, arrays, **metadata)
    return path


def held(path: Path) -> dict[str, bytes]:
    with open_checkpoint(path) as reader:
        return {n: reader.read(n).tobytes() for n in reader.tensors}


def test_a_model_of_the_zoo_there_and_back(tmp_path: Path) -> None:
    """Free sizes, both twins, no flag on the way back, and verify with onnxruntime as a side."""
    source, target = checkpoint(tmp_path, "convnet", "strided"), tmp_path / "a.onnx"
    ran = CliRunner().invoke(cli, ["export", str(source), str(target), "--json"])
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout)
    assert told["sizes"] == {"x": ["batch", 1, 11, 11]}
    assert told["verified"]["sides"] == ["torch", "flax"]
    assert told["verified"]["sizes"] == ["batch 2", "batch 3"]
    assert told["verified"]["worst"]["ratio"] < 8
    model = onnx.load(str(target))
    assert {o.domain: o.version for o in model.opset_import}[""] == 20
    props = [p.key for n in model.graph.node for p in n.metadata_props]
    assert set(props) <= {"pkg.torch.onnx.name_scopes"}  # no paths of this machine
    assert convert.check(target).intact

    convert.convert(target, tmp_path / "b.msgpack")
    convert.convert(tmp_path / "b.msgpack", tmp_path / "b.safetensors")
    assert held(tmp_path / "b.safetensors") == held(source)
    convert.convert(target, tmp_path / "c.safetensors", framework="torch")
    assert held(tmp_path / "c.safetensors") == held(source)
    report = convert.verify(target, tmp_path / "b.msgpack", level="outputs")
    assert report.verdict == "same"
    assert "onnxruntime:output" in {r.name for r in report.outputs if r.judged}


class Mine(nn.Module):
    """A module of nobody's zoo: a square matrix, one that is tied to it, counters, and a weight
    that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.fc.weight
        self.bn = nn.BatchNorm1d(4)
        self.spare = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(torch.relu(self.bn(self.fc(x))))


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    state = {n: probe.weight(n, tuple(x.shape)) for n, x in Mine().state_dict().items()}
    state["tied.weight"] = state["fc.weight"]
    state["bn.num_batches_tracked"] = np.int64(7)
    return write_to(tmp_path / "mine.safetensors", state, {})


def test_a_users_own_module_comes_back_by_the_layout_in_the_file(
    tmp_path: Path, mine: Path
) -> None:
    x = np.ones((2, 4), np.float32)
    target = tmp_path / "mine.onnx"
    made = convert.export(mine, target, torch=Mine, inputs=x, external_data=True)
    assert made.certificate.verified["sides"] == ["torch"]
    assert made.sizes == {"x": ("batch", 4)}
    assert "no output depends on spare: kept beside the graph" in made.notices
    (data,) = tmp_path.glob("mine.onnx.*.data")
    convert.convert(target, tmp_path / "mine.msgpack")
    convert.convert(tmp_path / "mine.msgpack", tmp_path / "back.safetensors")
    assert held(tmp_path / "back.safetensors") == held(mine)

    data.write_bytes(data.read_bytes()[:-1] + b"\xff")
    assert not convert.check(target).intact
    with pytest.raises(UsageError, match="exists already"):
        convert.export(mine, target, torch=Mine, inputs=x)
    convert.export(mine, target, torch=Mine, inputs=x, force=True, verify=False)
    assert not list(tmp_path.glob("mine.onnx.*.data"))  # what stood before is gone, its data too


def test_a_difference_keeps_nothing(
    tmp_path: Path, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Row("output", (2, 4), 1.0, 1e-7, 1.0, 0.0, False)
    monkeypatch.setattr(exporting, "hold", lambda *a: ([Held("torch", "batch 2", row)], []))
    before = set(tmp_path.iterdir())
    with pytest.raises(NotEquivalent, match="something else than torch, first in output"):
        convert.export(mine, tmp_path / "a.onnx", torch=Mine, inputs=np.ones((2, 4)))
    assert set(tmp_path.iterdir()) == before


class Branching(Mine):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) if x.sum() > 0 else x


def test_what_cannot_be_exported_says_why(tmp_path: Path, mine: Path) -> None:
    x = np.ones((2, 4))
    with pytest.raises(UsageError, match="torch cannot export Branching") as e:
        convert.export(mine, tmp_path / "a.onnx", torch=Branching, inputs=x, dynamic=False)
    assert "data-dependent" in str(e.value)
    with pytest.raises(UsageError, match="not called"):
        convert.export(mine, tmp_path / "a.bin", torch=Mine, inputs=np.ones((2, 4)))
    with pytest.raises(UsageError, match="traced of one call"):
        convert.export(mine, tmp_path / "a.onnx", torch=Mine)


def test_float16_is_judged_by_the_noise_of_float16(tmp_path: Path) -> None:
    """And what is beyond that noise is still different."""
    layer = nn.Linear(64, 8, bias=False)
    x = np.random.default_rng(0).standard_normal((4, 64)).astype("float32")
    side = TorchSide(layer.half(), Call(kwargs={"input": x}))
    weight = layer.weight.detach().numpy()
    for factor, same in ((1.0, True), (1.05, False)):
        held = onnx.helper.make_tensor_value_info
        half = onnx.TensorProto.FLOAT16
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("MatMul", ["input", "w"], ["output"])],
            "g",
            [held("input", half, ["n", 64])],
            [held("output", half, ["n", 8])],
            [onnx.numpy_helper.from_array((weight * factor).T.astype("float16"), "w")],
        )
        opset = [onnx.helper.make_opsetid("", 20)]
        onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "a")
        ((_, row),) = onnx_rows(OnnxSession(tmp_path / "a"), {"input": x}, side, None)
        assert row.same == same, row


def test_a_dtype_is_not_for_a_module_of_ones_own(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "a.pt")
    with pytest.raises(UsageError, match="dtype casts models of the zoo"):
        convert.export(
            *(tmp_path / "a.pt", tmp_path / "a.onnx"),
            torch=lambda: nn.Linear(2, 2),
            inputs=np.ones((2, 2)),
            dtype="float16",
        )
