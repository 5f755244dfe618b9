"""ONNX files as other exporters make them, converted: docs/onnx_foreign.json.

Small models whose weights follow from the tensors' names are exported by torch's older exporter and
by today's with its optimizer, at several opsets, with constants folded and not; passed through
onnxruntime's optimizer at each level, its quantization, onnx's version converter; written with
external data, with typed data, as half precision; and stripped of every name. Each file is
converted to Flax as a user's would be, with the model named and nothing else, and held against the
weights that went in, bit for bit. Arguments are names of cases; none means all.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parents[1] / "docs" / "onnx_foreign.json"


class Cnn(torch.nn.Module):
    """Convolutions with torch's own BatchNorm, which exporters fold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(16)
        self.conv2 = torch.nn.Conv2d(16, 16, 3, padding=1)
        self.fc = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(self.conv2(x)).mean((2, 3)))


class Block(torch.nn.Module):
    """A transformer block of torch's own modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 16)
        self.block = torch.nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.lstm = torch.nn.LSTM(16, 16, 2, batch_first=True, bidirectional=True)
        self.head = torch.nn.Linear(32, 16, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.block(self.embed(ids)))[0])


class Dense(torch.nn.Module):
    """Square matrices, which shapes cannot tell from their transposes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(16, 16)
        self.b = torch.nn.Linear(16, 16, bias=False)
        self.c = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


Made = tuple[torch.nn.Module, tuple[torch.Tensor, ...], dict[str, Any]]


def own(net: torch.nn.Module, *inputs: torch.Tensor) -> Made:
    """A module of this file with its weights, one call of it, and what a user would state."""
    from convert.runtime.torch_layout import derive_layout
    from zoo import probe

    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.from_numpy(probe.weight(name, tuple(tensor.shape))))
    return net.eval(), inputs, {"layout": derive_layout(net)[0]}


def zoo_model(family: str, key: str) -> Made:
    """The same of a small configuration of the zoo."""
    import dataclasses

    from zoo import probe
    from zoo.loading import build
    from zoo.registry import families

    model = families()[family]
    config = model.tiny[key]
    shapes = {
        t.name: t.shape
        for e in model.layout_of(config).entries
        if e.constant is None and e.tied_to is None
        for t in e.torch
    }
    net = build(model, config, "torch", probe.weights(shapes))
    inputs = [np.asarray(x) for x in model.inputs(config).values()]
    narrow = [x.astype(np.float32) if x.dtype.kind == "f" else x for x in inputs]
    tensors = tuple(map(torch.from_numpy, narrow))
    return net, tensors, {"model": family, "config": dataclasses.asdict(config)}


def dense() -> Made:
    return own(Dense(), torch.ones(2, 16))


def cnn() -> Made:
    return own(Cnn(), torch.ones(2, 3, 8, 8))


def block() -> Made:
    return own(Block(), torch.ones(2, 7, dtype=torch.int64))


def bert() -> Made:
    return zoo_model("bert", "sequence_classification")


def older(made: Made, path: Path, **options: Any) -> None:
    """torch's TorchScript-based exporter."""
    net, inputs, _ = made
    torch.onnx.export(net, inputs, str(path), dynamo=False, **{"opset_version": 17} | options)


def today(made: Made, path: Path, free: bool = True, **options: Any) -> None:
    """torch's exporter of today, with its optimizer unless told."""
    net, inputs, _ = made
    shapes = tuple(dict.fromkeys(range(x.ndim), torch.export.Dim.AUTO) for x in inputs)
    program = torch.onnx.export(
        net, inputs, dynamo=True, verbose=False, dynamic_shapes=shapes if free else None, **options
    )
    assert program is not None
    program.save(str(path))


def optimized(made: Made, path: Path, level: str) -> None:
    """Through onnxruntime's optimizer."""
    import onnxruntime

    draft = path.with_suffix(".draft")
    older(made, draft)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(
        onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}"
    )
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(str(draft), options, providers=["CPUExecutionProvider"])


def quantized(made: Made, path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    draft = path.with_suffix(".draft.onnx")
    older(made, draft)
    quantize_dynamic(str(draft), str(path))


def changed(made: Made, path: Path, change: Callable[[Any], Any], **saving: Any) -> None:
    """The older exporter's file, edited by way of the onnx library."""
    import onnx

    older(made, path)
    model = onnx.load(str(path))
    model = change(model) or model
    path.unlink()
    onnx.save(model, str(path), **saving)


def stripped(model: Any) -> None:
    """Numbers in place of every name."""
    called: dict[str, str] = {}
    given = {x.name for x in (*model.graph.input, *model.graph.output)}

    def number(name: str) -> str:
        return name if name in given or not name else called.setdefault(name, str(len(called)))

    for tensor in model.graph.initializer:
        tensor.name = number(tensor.name)
    del model.graph.value_info[:]
    for node in model.graph.node:
        node.name = ""
        node.input[:] = [number(n) for n in node.input]
        node.output[:] = [number(n) for n in node.output]


def unnamed_nodes(model: Any) -> None:
    for node in model.graph.node:
        node.name = ""


def typed(model: Any) -> None:
    """float_data in place of raw_data."""
    from onnx import numpy_helper

    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.ClearField("raw_data")
            tensor.float_data.extend(array.ravel().tolist())


def turned(model: Any) -> None:
    """A square matrix transposed under the name that it has, and the Gemm told so."""
    from onnx import numpy_helper

    held = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        flag = next((a for a in node.attribute if a.name == "transB"), None)
        if node.op_type == "Gemm" and flag is not None and flag.i:
            tensor = held[node.input[1]]
            array = np.ascontiguousarray(numpy_helper.to_array(tensor).T)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
            flag.i = 0


def to_opset(model: Any) -> Any:
    from onnx import version_converter

    return version_converter.convert_version(model, 21)


def as_it_is(model: Any) -> None:
    """Written again, in another way."""


def apart(all_in_one: bool) -> dict[str, Any]:
    return {
        "save_as_external_data": True,
        "all_tensors_to_one_file": all_in_one,
        "size_threshold": 0,
        **({"location": "weights.bin"} if all_in_one else {}),
    }


CASES: dict[str, tuple[Callable[[], Made], Callable[[Made, Path], None]]] = {
    "older, opset 14, BERT": (bert, lambda m, p: older(m, p, opset_version=14)),
    "older, opset 9, square matrices": (dense, lambda m, p: older(m, p, opset_version=9)),
    "older, opset 17, BERT": (bert, older),
    "older, constants not folded, BERT": (
        bert,
        lambda m, p: older(m, p, do_constant_folding=False),
    ),
    "older, initializers as inputs, BERT": (
        bert,
        lambda m, p: older(m, p, keep_initializers_as_inputs=True),
    ),
    "today, optimized, free sizes, BERT": (bert, today),
    "today, optimized, fixed sizes, BERT": (bert, lambda m, p: today(m, p, False)),
    "today, not optimized, opset 18, BERT": (
        bert,
        lambda m, p: today(m, p, optimize=False, opset_version=18),
    ),
    "onnxruntime's optimizer, basic, BERT": (bert, lambda m, p: optimized(m, p, "BASIC")),
    "onnxruntime's optimizer, extended, BERT": (bert, lambda m, p: optimized(m, p, "EXTENDED")),
    "onnxruntime's quantization, BERT": (bert, quantized),
    "older, torch's own BatchNorm": (cnn, older),
    "older, for training, torch's own BatchNorm": (
        cnn,
        lambda m, p: older(m, p, training=torch.onnx.TrainingMode.PRESERVE),
    ),
    "today, optimized, torch's own BatchNorm": (cnn, lambda m, p: today(m, p, False)),
    "onnxruntime's optimizer, all, convolutions": (cnn, lambda m, p: optimized(m, p, "ALL")),
    "older, torch's own transformer and LSTM": (block, older),
    "today, not optimized, torch's own transformer and LSTM": (
        block,
        lambda m, p: today(m, p, False, optimize=False),
    ),
    "older, square matrices": (dense, older),
    "a square matrix turned under its name": (dense, lambda m, p: changed(m, p, turned)),
    "typed data": (dense, lambda m, p: changed(m, p, typed)),
    "external data in one file": (dense, lambda m, p: changed(m, p, as_it_is, **apart(True))),
    "external data, a file a tensor": (dense, lambda m, p: changed(m, p, as_it_is, **apart(False))),
    "onnx's version converter": (dense, lambda m, p: changed(m, p, to_opset)),
    "operations without names": (dense, lambda m, p: changed(m, p, unnamed_nodes)),
    "all names stripped": (dense, lambda m, p: changed(m, p, stripped)),
    "all names stripped, BERT": (bert, lambda m, p: changed(m, p, stripped)),
}


def run(name: str) -> dict[str, Any]:
    """One case: "recovered", "refused" with the reason, or "WRONG"."""
    import convert
    from zoo.containers import open_checkpoint
    from zoo.containers.errors import ZooError

    make, write = CASES[name]
    made = make()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            logging.disable(logging.CRITICAL)
            write(made, path)
            logging.disable(logging.NOTSET)
        there, back = Path(folder, "there.msgpack"), Path(folder, "back.safetensors")
        try:
            convert.convert(path, there, **made[2])
        except ZooError as e:
            return {"outcome": "refused", "reason": [e.problem.partition(": ")[2], *e.details[-1:]]}
        convert.convert(there, back)
        wanted = made[0].state_dict()
        with open_checkpoint(back) as reader:
            held = {n: reader.read(n) for n in reader.tensors}
    wrong = [
        n
        for n, x in held.items()
        if "num_batches" not in n and x.tobytes() != wanted[n].numpy().tobytes()
    ]
    missing = [n for n in wanted if n not in held and "num_batches" not in n]
    if wrong:
        return {"outcome": "WRONG", "reason": wrong}
    return {"outcome": "recovered", "tensors": len(held), "tied": missing}


def main(arguments: list[str]) -> None:
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in arguments or CASES:
        results[name] = run(name)
        print(name, results[name], flush=True)
    ordered = {n: results[n] for n in CASES if n in results}
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
