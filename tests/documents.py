"""What a module of torch computes, in float32 and float64, and what may be called the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from support import Arrays
from torch import nn
from upstream import Tensors, default_dtype, plainly, tensors

from convert.judge.noise import MARGIN
from convert.judge.rows import FLOOR
from convert.runtime.arrays import named_outputs
from zoo import probe


def filled(module: nn.Module) -> nn.Module:
    """`module` in eval mode with weights that follow from their names."""
    state = {
        n: torch.from_numpy(np.asarray(probe.weight(n, tuple(t.shape))))
        for n, t in module.state_dict().items()
        if t.is_floating_point()
    }
    module.load_state_dict(state, strict=False)
    return module.eval()


def images_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1) if x.ndim == 4 else x


def outputs(module: nn.Module, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the module gives for one input in float32 and, with the same weights, in float64."""
    rough, exact = every_output(module, {"x": x})
    return rough["output"], exact["output"]


def every_output(module: nn.Module, given: Arrays, call: Any = plainly) -> tuple[Arrays, Arrays]:
    """All outputs of `call(module, inputs)` by name, in float32 and in float64.

    The module is in float32 before and after.
    """
    made = []
    for precision in ("float32", "float64"):
        module.to(getattr(torch, precision))
        with default_dtype(precision):  # with gradients, or torch.nn.Transformer takes a shortcut
            inputs: Tensors = tensors(given, precision)
            found = named_outputs(call(module, inputs))
        made.append({n: x.detach().numpy() for n, x in found.items()})
    module.float()
    return made[0], made[1]


def same(got: Any, rough: np.ndarray, exact: np.ndarray) -> None:
    """float32 outputs are as close as the noise of the document's own class allows."""
    noise = np.abs(rough - exact).max()
    allowed = MARGIN * max(noise, FLOOR * np.abs(exact).max())
    assert got.shape == rough.shape
    assert np.abs(np.asarray(got) - rough).max() <= allowed


def all_same(got: Arrays, rough: Arrays, exact: Arrays) -> None:
    """The same for every output by name."""
    assert got.keys() == rough.keys()
    for name, x in got.items():
        same(x, rough[name], exact[name])
