"""Why a normalisation gives something else."""

from __future__ import annotations

from typing import Any

import numpy as np

from convert.diagnose.case import Candidates, Case, Finding, first_fit, tensors_of
from convert.matching.alignment import gap
from zoo.layout.kinds import kinds

EPSILONS = (1e-5, 1e-6, 1e-12, 1e-3, 1e-8, 1e-7, 1e-4, 1e-2, 1e-10, 0.0)


def norm(case: Case) -> Finding | None:
    """LayerNorm, GroupNorm, RMSNorm, BatchNorm and their like."""
    return (
        first_fit(case, _epsilon(case))
        or first_fit(case, _affine(case))
        or first_fit(case, _statistics(case))
        or first_fit(case, _by_hand(case))
        or _fast_variance(case)
    )


def epsilon_name(module: Any) -> str | None:
    """What a torch layer calls its epsilon."""
    names = kinds()["norm"].attribute("eps").torch_names
    return next((n for n in names if isinstance(getattr(module, n, None), float)), None)


def _epsilon(case: Case) -> Candidates:
    name = epsilon_name(case.module)
    if name is None:
        return
    ours = getattr(case.module, name)
    said = [v for k, v in case.flax.items() if "eps" in k and isinstance(v, float | int)]
    for value in dict.fromkeys((*map(float, said), *EPSILONS)):
        if value != ours:
            yield (
                case.variant({name: value}),
                Finding(
                    "epsilon",
                    f"epsilon is {ours:g} in torch; Flax's values fit {value:g}",
                    f"set epsilon={ours:g} in the Flax layer",
                ),
            )


def _affine(case: Case) -> Candidates:
    own = tensors_of(case.module)
    for name, word, neutral in (("weight", "scale", 1.0), ("bias", "bias", 0.0)):
        if name in own:
            yield (
                case.variant(tensors={name: np.full_like(own[name], neutral)}),
                Finding(
                    "missing_" + word,
                    f"Flax leaves out the {word}",
                    f"use_{word}=True in the Flax layer, and load it",
                ),
            )
    if "weight" in own:
        yield (
            case.variant(tensors={"weight": own["weight"] + 1}),
            Finding(
                "scale_plus_one",
                "Flax multiplies by 1 + scale, torch by its weight",
                "store weight - 1 as the scale, or multiply by the scale itself",
            ),
        )


def _statistics(case: Case) -> Candidates:
    if case.kind == "batchnorm":
        mode = case.module.training
        yield (
            case.variant({"training": not mode}),
            Finding(
                "batch_statistics",
                "torch normalises by the "
                + ("batch's statistics, Flax by the running ones" if mode else "running statistics")
                + ("" if mode else ", Flax by the batch's"),
                f"use_running_average={not mode} in Flax: both in one mode, train or eval",
            ),
        )
    groups = getattr(case.module, "num_groups", None)
    if isinstance(groups, int):
        for n in range(1, case.module.num_channels + 1):
            if n != groups and case.module.num_channels % n == 0:
                yield (
                    case.variant({"num_groups": n}),
                    Finding(
                        "groups",
                        f"torch normalises in {groups} groups of channels, Flax in {n}",
                        f"num_groups={groups} in Flax",
                    ),
                )


def _by_hand(case: Case) -> Candidates:
    """Other formulas over the same axes."""
    x = case.input()
    name = epsilon_name(case.module)
    if x is None or name is None:
        return
    eps, own = getattr(case.module, name), tensors_of(case.module)
    if case.kind == "batchnorm":
        axes: tuple[int, ...] = (0, *range(2, x.ndim))
        shape = (1, -1, *(1,) * (x.ndim - 2))
    else:
        count = own["weight"].ndim if "weight" in own else 1
        axes, shape = tuple(range(x.ndim - count, x.ndim)), ()
    w, b = (own[n].reshape(shape or own[n].shape) if n in own else d
            for n, d in (("weight", 1.0), ("bias", 0.0)))  # fmt: skip
    centred = x - x.mean(axes, keepdims=True)
    var = (centred**2).mean(axes, keepdims=True)
    n = x.size // max(var.size, 1)
    if n > 1:
        yield (
            centred / np.sqrt(var * n / (n - 1) + eps) * w + b,
            Finding(
                "unbiased_variance",
                f"Flax divides by the unbiased variance (n - 1 = {n - 1}), torch by the biased",
                "divide the sum of squares by n",
            ),
        )
        yield (
            centred / (np.sqrt(var * n / (n - 1)) + eps) * w + b,
            Finding(
                "unbiased_variance",
                "Flax divides by the unbiased standard deviation plus epsilon",
                "divide by sqrt(variance + epsilon), the variance being the biased one",
            ),
        )
    yield (
        centred / (np.sqrt(var) + eps) * w + b,
        Finding(
            "epsilon", f"Flax adds epsilon {eps:g} after the root, torch under it",
            "divide by sqrt(variance + epsilon)",
        ),
    )  # fmt: skip
    square = (x**2).mean(axes, keepdims=True)
    for made, what in (
        (x / np.sqrt(square + eps) * w + b, "subtracts no mean (RMSNorm), torch does (LayerNorm)"),
        (centred / np.sqrt(var + eps) * w + b, "subtracts the mean (LayerNorm), torch does not"),
    ):
        advice = "use the same normalisation on both sides"
        yield made, Finding("norm_kind", f"Flax {what}", advice)


def _fast_variance(case: Case) -> Finding | None:
    """Flax's E[x^2] - E[x]^2 loses digits where the mean is large: centred inputs lose none."""
    x = case.input()
    if not case.flax.get("use_fast_variance") or case.rerun is None or x is None:
        return None
    axes = (0, *range(2, x.ndim)) if case.kind == "batchnorm" else (x.ndim - 1,)
    mean = x.mean(axes, keepdims=True)
    if case.call is None or not case.comparable:
        return None
    name = next(k for k, v in case.call.inputs.items() if v.dtype.kind == "f")
    made = case.rerun({name: x - mean})
    if made.shape != case.right.shape or gap(made, case.right) > case.tolerance * 3:
        return None
    worst = float(np.abs(mean).max() / max(x.std(), 1e-30))
    return Finding(
        "fast_variance",
        f"Flax's fast variance E[x^2] - E[x]^2 loses digits: means are up to {worst:.3g} "
        "standard deviations from zero, and with centred inputs both agree",
        "use_fast_variance=False in the Flax layer",
    )
