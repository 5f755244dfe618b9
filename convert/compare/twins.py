"""The zoo's own twins as sides of a comparison."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from convert.compare.flax_side import FlaxSide
from convert.compare.sides import Side
from convert.compare.torch_side import TorchSide, with_taps
from convert.matching.pair import Match, Pair
from convert.runtime.call import Call, cast
from convert.runtime.flax_function import NnxFunction
from zoo.layout import Layout
from zoo.loading import build
from zoo.model import Config, Model


def twin(
    model: Model,
    config: Config,
    framework: str,
    canonical: Mapping[str, np.ndarray],
    *,
    inputs: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
) -> Side:
    """The twin of one framework with these weights, its taps on."""
    given = model.inputs(config) if inputs is None else inputs
    if framework == "torch":
        module = build(model, config, "torch", canonical, param_dtype="float32")
        return TorchSide(module, Call(kwargs=given), with_taps, seed=seed)

    def make(precision: str, training: bool) -> NnxFunction:
        return NnxFunction(build(model, config, "flax", canonical, param_dtype=precision), training)

    return FlaxSide(
        make,
        Call(kwargs={k: model.to_flax(k, v) for k, v in given.items()}),
        model,
        layout_matches(model.layout_of(config)),
        model.layout_of(config).shapes("torch"),
        {name: name for name in given},
        taps=True,
        seed=seed,
    )


def layout_matches(layout: Layout) -> tuple[Match, ...]:
    """The pairs that the layout states."""
    return tuple(
        Match(
            tuple(t.name for t in view.entry.torch),
            tuple(t.name for t in view.tensors),
            view.ops,
            view.entry.kind,
        )
        for view in layout.view("nnx")
        if view.tensors
    )


def twin_pair(
    model: Model,
    torch: tuple[Config, Mapping[str, np.ndarray]],
    flax: tuple[Config, Mapping[str, np.ndarray]],
    inputs: Mapping[str, np.ndarray],
) -> Pair:
    """Both twins as modules, each with its config and weights, for finding where they part."""
    narrow = cast(inputs, "float32")
    return Pair(
        build(model, torch[0], "torch", torch[1], param_dtype="float32"),
        build(model, flax[0], "flax", flax[1], param_dtype="float32"),
        Call(kwargs=narrow),
        Call(kwargs={k: model.to_flax(k, v) for k, v in narrow.items()}),
        matches=layout_matches(model.layout_of(torch[0])),
    )
