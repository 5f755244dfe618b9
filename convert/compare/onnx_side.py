"""The outputs of an ONNX file in onnxruntime, beside those of modules that have its weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from convert.compare.sides import Side
from convert.compare.torch_side import TorchSide
from convert.compare.twins import twin
from convert.judge.noise import Arrays, Noise, judge
from convert.judge.rows import Row
from convert.runtime.onnx_session import OnnxSession
from convert.runtime.precision import full_precision
from zoo.containers.errors import UsageError
from zoo.model import Config, Model


def onnx_rows(
    session: OnnxSession, arrays: Mapping[str, np.ndarray], torch: TorchSide, flax: Side | None
) -> list[tuple[str, Row]]:
    """One row for each output beside torch's, and beside Flax's, with whose it is; `arrays` are the
    file's inputs by its names, and those of the two sides. onnxruntime computes in float32, or in
    the file's float16: what float64 says of torch in that precision is the noise."""
    own = session.precision
    narrow = {n: x.astype(np.float32) if x.dtype.kind == "f" else x for n, x in arrays.items()}
    made = list(session.run(narrow).items())
    with full_precision():
        precisions = dict.fromkeys([*torch.precisions, own])
        exact = {p: torch.run(p, backward=False).outputs for p in precisions}
        theirs = flax.run("float32", backward=False).outputs if flax is not None else None

        @functools.cache
        def rerun(precision: str, i: int) -> Arrays:
            return torch.shaken(i).run(precision, backward=False).outputs

        noise = Noise(exact.get("float64", exact["float32"]), rerun)
        rows = []
        for i, (name, rough) in enumerate(exact[own].items()):
            ours = _output(made, name, i, len(exact[own])), None
            reference = rough, exact["float64"][name] if "float64" in exact else None
            rows.append(("torch", noise.again(judge(name, ours, (rough, None), reference))))
            if theirs is not None:
                row = judge(name, ours, (theirs[name], None), reference)
                rows.append(("flax", noise.again(row)))
        return rows


def _output(made: list[tuple[str, np.ndarray]], name: str, place: int, count: int) -> np.ndarray:
    """The file's output of a name; by its place where other exporters call it otherwise."""
    short = name.removeprefix("output.")
    by_name = dict(made)
    if name in by_name or short in by_name:
        return by_name.get(name, by_name.get(short, made[0][1]))
    if len(made) == count:
        return made[place][1]
    raise UsageError(
        f"the file gives {', '.join(by_name)}, and not {short}",
        "compare the weights alone: level 'bits'",
    )


def compare_onnx(
    path: Path,
    model: Model,
    config: Config,
    canonical: Mapping[str, np.ndarray],
    inputs: Mapping[str, np.ndarray],
) -> list[Row]:
    """What onnxruntime makes of the file, beside the torch twin with its weights. `inputs` have the
    model's names; sizes that the file fixes are its own."""
    session = OnnxSession(path)
    names = list(session.inputs)
    if not set(names) <= set(inputs):
        if len(names) > len(inputs):
            raise UsageError(
                f"the file takes {', '.join(names)}, and {model.name} has {', '.join(inputs)}",
                "compare the weights alone: level 'bits'",
            )
        names = list(inputs)[: len(names)]  # exporters call them after the traced values
    given = dict(inputs)
    for name, dims in zip(names, session.inputs.values(), strict=True):
        given[name] = _of_sizes(name, inputs[name], dims)
    side = twin(model, config, "torch", canonical, inputs=given)
    assert isinstance(side, TorchSide)
    arrays = {theirs: given[ours] for theirs, ours in zip(session.inputs, names, strict=True)}
    rows = onnx_rows(session, arrays, side, None)
    return [_named(row) for _, row in rows]


def _named(row: Row) -> Row:
    return replace(row, name=f"onnxruntime:{row.name}")


def _of_sizes(name: str, x: np.ndarray, dims: tuple[int | None, ...]) -> np.ndarray:
    """The array at the sizes that are fixed: its beginning, or again from its beginning."""
    if len(dims) != x.ndim:
        raise UsageError(
            f"the file takes {name} with {len(dims)} axes, and the model with {x.ndim}",
            "compare the weights alone: level 'bits'",
        )
    for axis, n in enumerate(dims):
        if n is not None and n != x.shape[axis]:
            x = np.take(x, np.arange(n) % max(1, x.shape[axis]), axis)
    return x
