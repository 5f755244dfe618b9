"""Why a gradient is another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from convert.diagnose.case import first
from convert.diagnose.causes import Reason, found
from convert.diagnose.divergence import Judged
from convert.diagnose.hypotheses_tensors import factor_name
from convert.diagnose.reference import Reference
from convert.matching.alignment import gap
from convert.matching.bare import Copies
from zoo.layout.kinds import torch_kind

_FEW = 3  # numbers: one factor fits a single one always, and two too often


@dataclass
class Wrong:
    """A gradient that is not what it should be; arrays have torch's axes."""

    where: str  # "in", "out", "parameter"
    layer: str  # torch name
    key: str  # which input or output; the parameter's name
    judged: Judged
    exact: np.ndarray
    given: np.ndarray

    @property
    def title(self) -> str:
        """What it is the gradient of, in words."""
        of = {"in": f"its input {self.key}", "out": "its output", "parameter": self.key}
        return f"the gradient of {of[self.where]}"


def gradient(
    wrong: Wrong,
    reference: Reference,
    others: Mapping[str, np.ndarray],
    copies: Mapping[str, Copies],
) -> Reason:
    """The first cause that fits. `others` are torch's cotangents elsewhere, float32."""
    reason = first(
        partial(_of_copies, wrong, copies),
        partial(_rows, wrong, reference),
        partial(_masked, wrong, reference),
        partial(_stopped, wrong),
        partial(_of_statistics, wrong, reference),
        partial(_summand, wrong, others),
    )
    return reason or found("unknown", "gradient", gradient=wrong.title)


def _of_copies(wrong: Wrong, copies: Mapping[str, Copies]) -> Reason | None:
    """A tensor that torch shares and Flax does not."""
    if wrong.where != "parameter" or wrong.key not in copies:
        return None
    others, flax = copies[wrong.key]
    told = [
        ", ".join(n[:3]) + (f" and {len(n) - 3} more" if len(n) > 3 else "") for n in (others, flax)
    ]
    return found("tied", "copies", name=wrong.key, other=told[0], flax=told[1])


def _masked(wrong: Wrong, reference: Reference) -> Reason | None:
    """Numbers of a parameter that only one side multiplies by zero, whatever they are."""
    if wrong.where != "parameter" or torch_kind(reference.modules[wrong.layer]) == "embedding":
        return None
    off = np.abs(wrong.exact - wrong.given) > wrong.judged.tolerance
    count = int(off.sum())
    if count and not wrong.exact[off].any() and wrong.exact[~off].any():
        return found("mask", "gradient", name=wrong.key, count=count, size=off.size)
    if count and not wrong.given[off].any() and wrong.given[~off].any():
        return found("mask", "gradient in Flax", name=wrong.key, count=count, size=off.size)
    return None


def _stopped(wrong: Wrong) -> Reason | None:
    quiet = wrong.judged.tolerance
    if np.abs(wrong.given).max(initial=0.0) <= quiet:
        return found("stop_gradient", gradient=wrong.title)
    if np.abs(wrong.exact).max(initial=0.0) <= quiet:
        return found("stop_gradient", "detach", gradient=wrong.title)
    if wrong.exact.size < _FEW:
        return None  # a factor between so few numbers tells nothing
    factor = float((wrong.exact * wrong.given).sum() / (wrong.exact**2).sum())
    if not factor or factor_name(factor) == "1":
        return None
    if gap(wrong.exact * factor, wrong.given) <= quiet * max(1.0, abs(factor)):
        return found("scale", "gradient", gradient=wrong.title, factor=factor_name(factor))
    return None


def _rows(wrong: Wrong, reference: Reference) -> Reason | None:
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
        return found("padding_idx", row=row)
    if not np.abs(wrong.given[index]).any():
        return found("padding_idx", "only in Flax", row=index)
    return None


def _of_statistics(wrong: Wrong, reference: Reference) -> Reason | None:
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
        return found("stop_gradient", "statistics", gradient=wrong.title)
    return None


def _summand(wrong: Wrong, others: Mapping[str, np.ndarray]) -> Reason | None:
    """Another layer's share of the gradient is left out, or counted again."""
    difference = wrong.given - wrong.exact
    for name, x in others.items():
        if x.shape != wrong.exact.shape or not np.abs(x).any():
            continue
        factor = float((x * difference).sum() / (x.astype(np.float64) ** 2).sum())
        if abs(factor + 1) < 1e-3 and gap(-x, difference) <= 2 * wrong.judged.tolerance:
            return found("stop_gradient", "path", gradient=wrong.title, path=name)
        if abs(factor - 1) < 1e-3 and gap(x, difference) <= 2 * wrong.judged.tolerance:
            return found("stop_gradient", "path in torch", gradient=wrong.title, path=name)
    return None
