"""Why a gradient is another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from convert.diagnose.case import Finding
from convert.diagnose.reference import Judged, Reference
from convert.diagnose.weights import factor_name
from convert.matching.alignment import gap
from zoo.layout.kinds import torch_kind


@dataclass
class Wrong:
    """A gradient that is not what it should be; arrays have torch's axes."""

    where: str  # "in", "out", "parameter"
    layer: str  # torch name
    key: str  # which input or output; the parameter's name
    judged: Judged
    exact: np.ndarray
    given: np.ndarray


def gradient(wrong: Wrong, reference: Reference, others: Mapping[str, np.ndarray]) -> Finding:
    """The first cause that fits. `others` are torch's cotangents elsewhere, float32."""
    title = {"in": f"the gradient of its input {wrong.key}", "out": "the gradient of its output",
             "parameter": f"the gradient of {wrong.key}"}[wrong.where]  # fmt: skip
    return (
        _rows(wrong, reference)
        or _stopped(wrong, title)
        or _of_statistics(wrong, reference, title)
        or _summand(wrong, title, others)
        or Finding("unknown", f"{title} is another; no known cause fits",
                   "look for stop_gradient, custom derivatives and what is not differentiable")
    )  # fmt: skip


def _stopped(wrong: Wrong, title: str) -> Finding | None:
    quiet = wrong.judged.tolerance
    if np.abs(wrong.given).max(initial=0.0) <= quiet:
        advice = "take stop_gradient out of the Flax layer"
        return Finding("stop_gradient", f"{title} is zero in Flax, not in torch", advice)
    if np.abs(wrong.exact).max(initial=0.0) <= quiet:
        advice = "jax.lax.stop_gradient where torch has detach"
        return Finding("stop_gradient", f"{title} is zero in torch (detach), not in Flax", advice)
    factor = float((wrong.exact * wrong.given).sum() / (wrong.exact**2).sum())
    if factor and gap(wrong.exact * factor, wrong.given) <= quiet * max(1.0, abs(factor)):
        return Finding("scale", f"{title} is {factor_name(factor)} times torch's in Flax",
                       "look for a factor that only one side differentiates")  # fmt: skip
    return None


def _rows(wrong: Wrong, reference: Reference) -> Finding | None:
    """An embedding's row of padding, which torch gives no gradient."""
    module = reference.modules[wrong.layer]
    if wrong.where != "parameter" or torch_kind(module) != "embedding":
        return None
    off = np.abs(wrong.exact - wrong.given).max(-1) > wrong.judged.tolerance
    row = getattr(module, "padding_idx", None)
    if off.sum() != 1:
        return None
    index = int(np.flatnonzero(off)[0])
    if row == index:
        return Finding(
            "padding_idx",
            f"row {row} gets a gradient in Flax; in torch it is padding_idx and gets none",
            "stop the gradient of looking up that row in Flax",
        )
    if not np.abs(wrong.given[index]).any():
        return Finding("padding_idx", f"row {index} gets no gradient in Flax, in torch it does",
                       f"padding_idx={index} in torch too, or nowhere")  # fmt: skip
    return None


def _of_statistics(wrong: Wrong, reference: Reference, title: str) -> Finding | None:
    """A normalisation whose mean and variance are not differentiated."""
    module = reference.modules[wrong.layer]
    if wrong.where != "in" or torch_kind(module) not in ("norm", "batchnorm"):
        return None
    if not hasattr(module, "eps") or getattr(module, "weight", None) is None:
        return None
    call = next(c for c in reference.trace.calls if c.name == wrong.layer)
    x = call.inputs[wrong.key].astype(np.float64)
    batch = torch_kind(module) == "batchnorm"
    axes = (0, *range(2, x.ndim)) if batch else (x.ndim - 1,)
    weight = module.weight.detach().numpy()
    weight = weight.reshape(1, -1, *(1,) * (x.ndim - 2)) if batch else weight
    plain = weight / np.sqrt(x.var(axes, keepdims=True) + module.eps)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.broadcast_to(wrong.given / plain, x.shape)
    # The ratio would be the output's cotangent: then its sum over the statistics is the bias's.
    made = np.nan_to_num(ratio - ratio.mean(axes, keepdims=True))
    normal = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + module.eps)
    made = plain * (made - normal * (ratio * normal).mean(axes, keepdims=True))
    if gap(made, wrong.exact) <= 4 * wrong.judged.tolerance:
        return Finding("stop_gradient", f"{title} lacks what goes through the mean and variance",
                       "take stop_gradient off the statistics in Flax")  # fmt: skip
    return None


def _summand(wrong: Wrong, title: str, others: Mapping[str, np.ndarray]) -> Finding | None:
    """Another layer's share of the gradient is left out, or counted again."""
    difference = wrong.given - wrong.exact
    for name, x in others.items():
        if x.shape != wrong.exact.shape or not np.abs(x).any():
            continue
        factor = float((x * difference).sum() / (x.astype(np.float64) ** 2).sum())
        if abs(factor + 1) < 1e-3 and gap(-x, difference) <= 2 * wrong.judged.tolerance:
            what = f"{title} lacks in Flax what comes back by {name}"
            return Finding("stop_gradient", what, "take stop_gradient out of that path in Flax")
        if abs(factor - 1) < 1e-3 and gap(x, difference) <= 2 * wrong.judged.tolerance:
            what = f"{title} has in Flax what comes back by {name}, in torch it does not"
            return Finding("stop_gradient", what, "jax.lax.stop_gradient where torch has detach")
    return None
