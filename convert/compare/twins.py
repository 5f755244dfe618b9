"""The zoo's own twins as sides of a comparison."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from convert.compare.flax_side import FlaxSide
from convert.compare.sides import Side
from convert.compare.torch_side import TorchSide
from convert.matching.pair import Pair, layout_matches
from convert.runtime.call import Call
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
    """The twin of one framework with these weights; `inputs` have torch's axes."""
    given = model.inputs(config) if inputs is None else inputs
    module = build(model, config, framework, canonical, param_dtype="float32")
    if framework == "torch":
        return TorchSide(module, Call(kwargs=given), seed=seed)
    layout = model.layout_of(config)
    return FlaxSide(
        module,
        Call(kwargs={k: model.to_flax(k, v) for k, v in given.items()}),
        model,
        layout_matches(layout),
        layout.shapes("torch"),
        {name: name for name in given},
        seed=seed,
    )


def twin_pair(
    model: Model,
    torch: tuple[Config, Mapping[str, np.ndarray]],
    flax: tuple[Config, Mapping[str, np.ndarray]],
    inputs: Mapping[str, np.ndarray],
) -> Pair:
    """Both twins as modules, each with its config and weights, for finding where they part."""
    return Pair(
        build(model, torch[0], "torch", torch[1], param_dtype="float32"),
        build(model, flax[0], "flax", flax[1], param_dtype="float32"),
        Call(kwargs=inputs).cast("float32"),
        Call(kwargs={k: model.to_flax(k, v) for k, v in inputs.items()}).cast("float32"),
        matches=layout_matches(model.layout_of(torch[0])),
    )
