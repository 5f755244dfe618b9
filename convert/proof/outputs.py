"""Outputs and intermediates of two models, judged by what rounding explains.

The reference is the PyTorch twin with the weights of A, run in float32 and in float64; the gap
between the two is the noise. Nothing is compared with a tolerance that somebody chose.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from convert.proof.report import FLOOR, Row
from zoo.containers.errors import MissingExtra
from zoo.loading import build
from zoo.model import Config, Model

MARGIN = 8.0  # times the noise
EXACT = 1e-10  # of the scale, in float64
PRECISIONS = ("float32", "float64")

Arrays = dict[str, np.ndarray]


def compare_outputs(
    model: Model,
    config: Config,
    a: tuple[str, Mapping[str, np.ndarray]],
    b: tuple[str, Mapping[str, np.ndarray]],
) -> list[Row]:
    """One row for each output and tap. `a` and `b` are (framework, canonical tensors)."""
    inputs = model.inputs(config)
    with _frameworks():

        def both(framework: str, canonical: Mapping[str, np.ndarray]) -> dict[str, Arrays]:
            return {p: run(model, config, framework, canonical, inputs, p) for p in PRECISIONS}

        reference = both("torch", a[1])
        sides = [reference if side is a and a[0] == "torch" else both(*side) for side in (a, b)]
    return judge(reference, *sides)


def judge(
    reference: Mapping[str, Arrays], a: Mapping[str, Arrays], b: Mapping[str, Arrays]
) -> list[Row]:
    """The rows for runs of the reference and of both sides, each by its precision."""
    rows = []
    for name, exact in reference["float64"].items():
        noise = _gap(reference["float32"][name], exact)
        scale = float(np.abs(exact).max(initial=0.0))
        error = _gap(a["float32"][name], b["float32"][name])
        error64 = _gap(a["float64"][name], b["float64"][name])
        same = error <= MARGIN * max(noise, FLOOR * scale) and error64 <= EXACT * scale
        rows.append(Row(name, exact.shape, error, noise, scale, error64, same))
    return rows


def run(
    model: Model,
    config: Config,
    framework: str,
    canonical: Mapping[str, np.ndarray],
    inputs: Mapping[str, np.ndarray],
    precision: str,
) -> Arrays:
    """Outputs and taps of one twin in eval mode, run in `precision`; all given as float64."""
    given = {
        name: x.astype(precision) if np.issubdtype(x.dtype, np.floating) else x
        for name, x in inputs.items()
    }
    runner = _run_torch if framework == "torch" else _run_flax
    output, taps = runner(model, config, canonical, given, precision)
    arrays = {k: np.asarray(v, np.float64) for k, v in {**taps, **named_outputs(output)}.items()}
    if framework == "flax":
        arrays = {k: model.from_flax(k, v) for k, v in arrays.items()}
    return arrays


def _run_torch(
    model: Model,
    config: Config,
    canonical: Mapping[str, np.ndarray],
    inputs: Mapping[str, np.ndarray],
    precision: str,
) -> tuple[Any, dict[str, Any]]:
    import torch

    module = build(model, config, "torch", canonical, param_dtype=precision)
    with torch.no_grad():
        return module(**{k: torch.from_numpy(v) for k, v in inputs.items()}, taps=True)  # type: ignore[no-any-return]


def _run_flax(
    model: Model,
    config: Config,
    canonical: Mapping[str, np.ndarray],
    inputs: Mapping[str, np.ndarray],
    precision: str,
) -> tuple[Any, dict[str, Any]]:
    import jax
    from flax import nnx

    module = build(model, config, "flax", canonical, param_dtype=precision)
    graph, state = nnx.split(module)

    @jax.jit
    def call(state: Any, inputs: dict[str, Any]) -> Any:
        return nnx.merge(graph, state)(**inputs, taps=True)

    given = {k: model.to_flax(k, v) for k, v in inputs.items()}
    return jax.device_get(call(state, given))  # type: ignore[no-any-return]


@contextlib.contextmanager
def _frameworks() -> Iterator[None]:
    """Both frameworks at their highest precision and with 64 bits, and as they were afterwards."""
    try:
        import torch
    except ImportError:
        raise MissingExtra("comparing outputs", "torch") from None
    try:
        import jax
    except ImportError:
        raise MissingExtra("comparing outputs", "flax") from None
    before = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        with jax.enable_x64(True), jax.default_matmul_precision("highest"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = cudnn


def named_outputs(output: Any, name: str = "output") -> dict[str, Any]:
    """Every array of an output under a dotted name; NamedTuples by field, tuples by index."""
    if output is None:
        return {}
    if hasattr(output, "_asdict"):
        parts = output._asdict().items()
    elif isinstance(output, tuple | list):
        parts = enumerate(output)
    else:
        return {name: output}
    return {k: v for key, part in parts for k, v in named_outputs(part, f"{name}.{key}").items()}


def _gap(a: np.ndarray, b: np.ndarray) -> float:
    """max|a - b|; NaN or a wrong shape anywhere is infinitely far."""
    if a.shape != b.shape:
        return float("inf")
    gap = float(np.abs(a - b).max(initial=0.0))
    return gap if np.isfinite(gap) else float("inf")
