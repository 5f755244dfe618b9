"""ONNX as a container: our scan against the onnx library, and names and axes against the graph."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from support import canonical
from torch import nn

import convert
import zoo
from convert.runtime.torch_layout import derive_layout
from zoo import probe
from zoo.checkpoint.label import read_label
from zoo.checkpoint.plan import make_plan, read_step
from zoo.checkpoint.request import Request
from zoo.containers import open_checkpoint
from zoo.containers.errors import UsageError, ZooError
from zoo.containers.onnx_graph import OnnxReader, looks_like
from zoo.layout import Layout
from zoo.loading import build
from zoo.registry import families

Arrays = dict[str, np.ndarray]


def saved(path: Path, nodes: list[Any], *tensors: Any, **saving: Any) -> Path:
    """A model of these nodes from x (2, 4) to y."""
    of = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", of[:1], of[1:], list(tensors))
    onnx.save(helper.make_model(graph), str(path), **saving)
    return path


def through(name: str, node: str = "Identity") -> Any:
    return helper.make_node(node, [name], ["y"])


def exported(net: nn.Module, path: Path, *inputs: torch.Tensor, **options: Any) -> Path:
    """By torch's older exporter, which is quick and renames what it turns."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            given = {"opset_version": 17} | options
            torch.onnx.export(net, inputs, str(path), dynamo=False, **given)
        finally:
            logging.disable(logging.NOTSET)
    return path


def seeded(net: nn.Module) -> nn.Module:
    for name, x in net.state_dict().items():
        if x.is_floating_point():
            x.copy_(torch.from_numpy(probe.weight(name, tuple(x.shape))))
    return net.eval()


def recovered(path: Path, request: Request) -> Arrays:
    with open_checkpoint(path) as reader:
        plan = make_plan(reader, read_label(reader), "torch", request=request)
        return {
            n: x for s in plan.steps for n, x in zip(s.targets, read_step(reader, s), strict=True)
        }


def of(layout: Layout | nn.Module) -> Request:
    return Request(layout=layout if isinstance(layout, Layout) else derive_layout(layout)[0])


def assert_holds(found: Arrays, state: dict[str, Any]) -> None:
    counters = {n for n in state if n.endswith("num_batches_tracked")}
    assert found.keys() - counters == state.keys() - counters
    for name in state.keys() - counters:
        assert found[name].tobytes() == np.asarray(state[name]).tobytes(), name


# Held against the library.

DTYPES = {
    **{n: np.dtype(n) for n in ("float32", "float64", "float16", "int64", "int32", "int16")},
    **{n: np.dtype(n) for n in ("int8", "uint8", "uint16", "uint32", "uint64", "bool")},
    **{n: np.dtype(n) for n in ("complex64", "complex128")},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}


def as_typed(tensor: TensorProto, array: np.ndarray) -> TensorProto:
    """The same with its values in the typed field that its dtype has."""
    of = helper.tensor_dtype_to_field(tensor.data_type)
    values: Any = array.ravel()
    if array.dtype.kind == "c":
        values = values.view(values.real.dtype)
    elif array.dtype.kind == "b":
        values = values.astype(int)
    elif array.dtype.kind in "fV" and of == "int32_data":
        values = values.view(f"u{array.itemsize}")
    tensor.ClearField("raw_data")
    getattr(tensor, of).extend(values.tolist())
    return tensor


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_read_as_the_library_does(tmp_path: Path, name: str) -> None:
    raw = np.random.default_rng(0).integers(0, 2, 64, np.uint8) * (1 if name == "bool" else 77)
    array = np.resize(raw, 6 * DTYPES[name].itemsize).view(DTYPES[name]).reshape(2, 1, 3)
    tensors = [numpy_helper.from_array(x, n) for n, x in {"raw": array, "typed": array}.items()]
    tensors[1] = as_typed(tensors[1], array)
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(array))
    path = saved(tmp_path / "a.onnx", [constant, through("raw")], *tensors)
    with open_checkpoint(path) as reader:
        assert reader.container == "onnx"
        assert list(reader.tensors) == ["raw", "typed", "c"]
        for key in reader.tensors:
            got = reader.read(key)
            assert (got.dtype, got.shape) == (array.dtype, array.shape)
            assert got.tobytes() == array.tobytes(), key


@pytest.mark.parametrize("one_file", [True, False])
def test_external_data_is_read_where_it_lies(tmp_path: Path, one_file: bool) -> None:
    arrays = {n: probe.weight(n, (3, 5)) for n in ("a", "b", "c.d")}
    tensors = [numpy_helper.from_array(x, n) for n, x in arrays.items()]
    location = "all.bin" if one_file else None
    path = saved(
        tmp_path / "a.onnx",
        [through("a")],
        *tensors,
        save_as_external_data=True,
        all_tensors_to_one_file=one_file,
        location=location,
        size_threshold=0,
    )
    assert path.stat().st_size < 1000
    with open_checkpoint(path) as reader:
        for name, x in arrays.items():
            assert reader.read(name).tobytes() == x.tobytes()


def test_what_is_no_number_is_named_and_left_out(tmp_path: Path) -> None:
    text = helper.make_tensor("text", TensorProto.STRING, [1], [b"a"])
    half = helper.make_tensor("half", TensorProto.INT4, [2], [1, 2])
    path = saved(
        tmp_path / "a.onnx", [through("w")], text, half, numpy_helper.from_array(np.ones(2), "w")
    )
    with open_checkpoint(path) as reader:
        assert list(reader.tensors) == ["w"]
        assert reader.notices == [
            "of dtypes that are not carried, not read: text (STRING), half (INT4)"
        ]


def test_only_models_are_taken_for_one() -> None:
    assert looks_like(helper.make_model(helper.make_graph([], "g", [], [])).SerializeToString())
    for start in (b"", b"\x08", b"\x08\x07", b"\x08\x00\x12", b"\x80\x02}q", b"{", b"\x08\x07\xff"):
        assert not looks_like(start)


# Names and axes.


class Square(nn.Module):
    """Square matrices, which no shape can tell from their transposes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


@pytest.fixture
def square() -> nn.Module:
    return seeded(Square())


X = torch.ones(2, 3, 4)


def edited(path: Path, change: Callable[[Any], None]) -> Path:
    model = onnx.load(str(path))
    change(model)
    onnx.save(model, str(path))
    return path


def test_a_turned_matrix_is_turned_back(tmp_path: Path, square: nn.Module) -> None:
    path = exported(square, tmp_path / "a.onnx", X)
    with open_checkpoint(path) as reader:
        assert any("::MatMul" in n for n in reader.tensors)
    assert_holds(recovered(path, of(square)), square.state_dict())


@pytest.mark.parametrize("there", ["right", "left", "gemm", "transposed"])
def test_axes_come_from_the_graph_and_never_from_the_shape(tmp_path: Path, there: str) -> None:
    """One square matrix under the layout's name, in each way that a graph can take it."""
    weight = probe.weight("fc.weight", (4, 4))
    stored, nodes = {
        "right": (weight.T, [helper.make_node("MatMul", ["x", "fc.weight"], ["y"])]),
        "left": (weight, [helper.make_node("MatMul", ["fc.weight", "x"], ["y"])]),
        "gemm": (weight, [helper.make_node("Gemm", ["x", "fc.weight"], ["y"], transB=1)]),
        "transposed": (
            weight,
            [
                helper.make_node("Transpose", ["fc.weight"], ["t"], perm=[1, 0]),
                helper.make_node("MatMul", ["x", "t"], ["y"]),
            ],
        ),
    }[there]
    tensor = numpy_helper.from_array(np.ascontiguousarray(stored), "fc.weight")
    path = saved(tmp_path / "a.onnx", nodes, tensor)
    net = nn.ModuleDict({"fc": nn.Linear(4, 4, bias=False)})
    assert_holds(recovered(path, of(net)), {"fc.weight": weight})


def test_a_matrix_that_is_used_times_a_number_is_not_the_models(
    tmp_path: Path, square: nn.Module
) -> None:
    path = exported(square, tmp_path / "a.onnx", torch.ones(2, 4))

    def scale(model: Any) -> None:
        for tensor in model.graph.initializer:
            tensor.name = tensor.name.replace("a.weight", "onnx::Gemm_1")
        gemm = model.graph.node[0]
        assert gemm.op_type == "Gemm"
        gemm.input[1] = "onnx::Gemm_1"
        gemm.ClearField("attribute")
        gemm.attribute.extend([helper.make_attribute("alpha", 0.5)])

    with pytest.raises(ZooError, match=r"missing: a\.weight"):
        recovered(edited(path, scale), of(square))


def test_without_names_of_operations_the_bias_says_whose_a_matrix_is(
    tmp_path: Path, square: nn.Module
) -> None:
    path = exported(square, tmp_path / "a.onnx", X)

    def forget(model: Any) -> None:
        for node in model.graph.node:
            node.name = ""

    assert_holds(recovered(edited(path, forget), of(square)), square.state_dict())


def test_without_any_name_nothing_is_guessed(tmp_path: Path, square: nn.Module) -> None:
    path = exported(square, tmp_path / "a.onnx", X)

    def forget(model: Any) -> None:
        called = {t.name: str(i) for i, t in enumerate(model.graph.initializer)}
        for tensor in model.graph.initializer:
            tensor.name = called[tensor.name]
        for node in model.graph.node:
            node.name = ""
            node.input[:] = [called.get(n, n) for n in node.input]

    with pytest.raises(ZooError, match="folds into constants") as e:
        recovered(edited(path, forget), of(square))
    assert "missing: a.weight" in str(e.value)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.net = kind(4, 4, 2, bidirectional=True)  # square: only the gates' order tells

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)[0]


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_gates_come_back_in_torchs_order(tmp_path: Path, kind: type[nn.RNNBase]) -> None:
    net = seeded(Recurrent(kind))
    path = exported(net, tmp_path / "a.onnx", X)
    assert_holds(recovered(path, of(net)), net.state_dict())


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))


def test_folded_batchnorm_is_refused_with_the_reason(tmp_path: Path) -> None:
    net, x = seeded(Normed()), torch.ones(2, 3, 5, 5)
    folded = exported(net, tmp_path / "a.onnx", x)
    with pytest.raises(UsageError, match=r"folded into the convolutions before it \(bn\)"):
        recovered(folded, of(net))
    # As what it now is, where that is what the user says: a convolution with a bias.
    as_it_is = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3)})
    assert set(recovered(folded, of(as_it_is))) == {"conv.weight", "conv.bias"}
    kept = exported(net, tmp_path / "b.onnx", x, training=torch.onnx.TrainingMode.PRESERVE)
    assert_holds(recovered(kept, of(net)), net.state_dict())


@pytest.mark.parametrize(
    ("family", "key"),
    [("bert", "pretraining"), ("resnet", "basic"), ("recurrent", "lstm"), ("sac", "policy")],
)
def test_a_family_is_recognised_by_what_the_older_exporter_leaves(
    tmp_path: Path, family: str, key: str
) -> None:
    model = families()[family]
    config = model.tiny[key]
    values = canonical(model, config)
    net = build(model, config, "torch", values)
    inputs = [
        torch.from_numpy(np.asarray(x, np.float32 if x.dtype.kind == "f" else x.dtype))
        for x in model.inputs(config).values()
    ]
    path = exported(net, tmp_path / "a.onnx", *inputs)
    convert.convert(path, tmp_path / "a.msgpack", config=None)
    convert.convert(tmp_path / "a.msgpack", tmp_path / "a.safetensors")
    with open_checkpoint(tmp_path / "a.safetensors") as reader:
        assert values.keys() <= set(reader.tensors)
        for name, x in values.items():
            assert reader.read(name).tobytes() == x.tobytes(), name


def test_zoo_load_takes_it_where_names_fit(tmp_path: Path) -> None:
    net = zoo.create("mlp_2_3_1", "torch", seed=1)
    path = exported(net, tmp_path / "a.onnx", torch.ones(4, 2))
    again = zoo.load(path, "torch", model="mlp_2_3_1")
    assert_holds({n: x.numpy() for n, x in again.state_dict().items()}, net.state_dict())


def test_constants_of_the_code_are_no_weights(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "a.onnx",
        [
            helper.make_node("MatMul", ["x", "fc.weight"], ["h"]),
            helper.make_node("Mul", ["h", "val_1"], ["y"]),
        ],
        numpy_helper.from_array(probe.weight("w", (4, 4)), "fc.weight"),
        numpy_helper.from_array(np.float32([0.5]), "val_1"),
        numpy_helper.from_array(np.int64([1, 2]), "encoder.lifted_tensor_0"),
    )
    net = nn.ModuleDict({"fc": nn.Linear(4, 4, bias=False)})
    assert set(recovered(path, of(net))) == {"fc.weight"}
    with open_checkpoint(path) as reader:
        assert isinstance(reader, OnnxReader)
        assert set(reader.tensors) == {"fc.weight", "val_1", "encoder.lifted_tensor_0"}


def test_a_weight_that_the_layout_lacks_is_not_dropped(tmp_path: Path, square: nn.Module) -> None:
    path = exported(square, tmp_path / "a.onnx", X)
    half = nn.ModuleDict({"a": nn.Linear(4, 4)})
    with pytest.raises(ZooError, match=r"surplus: b\.bias"):
        recovered(path, of(half))
