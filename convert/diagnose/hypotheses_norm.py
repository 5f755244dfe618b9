"""Why a normalisation gives something else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.diagnose.case import Candidates, Case, first_fit, tensors_of
from convert.diagnose.causes import Reason, found
from convert.matching.alignment import gap
from zoo.layout.kinds import kinds

EPSILONS = (1e-5, 1e-6, 1e-12, 1e-3, 1e-8, 1e-7, 1e-4, 1e-2, 1e-10, 0.0)


def norm(case: Case) -> Reason | None:
    """LayerNorm, GroupNorm, RMSNorm, BatchNorm and their like."""
    return first_fit(case, _epsilon, _affine, _mode, _groups, _variances, _means, _centred_inputs)


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
            yield case.variant({name: value}), found("epsilon", torch=ours, flax=value)


def _affine(case: Case) -> Candidates:
    own = tensors_of(case.module)
    weight, bias = own.get("weight"), own.get("bias")
    if weight is not None:
        yield case.variant(tensors={"weight": np.ones_like(weight)}), found("missing_scale")
    if bias is not None:
        yield case.variant(tensors={"bias": np.zeros_like(bias)}), found("missing_bias")
    if weight is not None:
        yield case.variant(tensors={"weight": weight + 1}), found("scale_plus_one", "code")
        yield case.variant(tensors={"weight": weight - 1}), found("scale_plus_one", "plain")


def _mode(case: Case) -> Candidates:
    if case.kind == "batchnorm":
        mode = case.module.training
        yield (
            case.variant({"training": not mode}),
            found("batch_statistics", "training" if mode else "eval"),
        )


def _groups(case: Case) -> Candidates:
    groups = getattr(case.module, "num_groups", None)
    if not isinstance(groups, int):
        return
    for n in range(1, case.module.num_channels + 1):
        if n != groups and case.module.num_channels % n == 0:
            yield case.variant({"num_groups": n}), found("groups", torch=groups, flax=n)


@dataclass(frozen=True)
class _Parts:
    """What a normalisation is made of; all broadcast to its input."""

    x: np.ndarray
    axes: tuple[int, ...]  # those that are normalised over
    eps: float
    weight: np.ndarray
    bias: np.ndarray

    @property
    def centred(self) -> np.ndarray:
        """The input less its mean."""
        return np.asarray(self.x - self.x.mean(self.axes, keepdims=True))

    @property
    def variance(self) -> np.ndarray:
        """The biased variance."""
        return np.asarray(self.x.var(self.axes, keepdims=True))

    def affine(self, x: np.ndarray) -> np.ndarray:
        """x with scale and bias."""
        return np.asarray(x * self.weight + self.bias)


def _parts(case: Case) -> _Parts | None:
    x = case.input()
    name = epsilon_name(case.module)
    if x is None or name is None:
        return None
    own = tensors_of(case.module)
    if case.kind == "batchnorm":
        axes: tuple[int, ...] = (0, *range(2, x.ndim))
        own = {n: v.reshape(1, -1, *(1,) * (x.ndim - 2)) for n, v in own.items() if v.ndim == 1}
    else:
        count = own["weight"].ndim if "weight" in own else 1
        axes = tuple(range(x.ndim - count, x.ndim))
    weight, bias = own.get("weight", np.ones(())), own.get("bias", np.zeros(()))
    return _Parts(x, axes, getattr(case.module, name), weight, bias)


def _variances(case: Case) -> Candidates:
    """What the centred values are divided by."""
    if (p := _parts(case)) is None:
        return
    n = p.x.size // max(p.variance.size, 1)
    if n > 1:
        unbiased = p.variance * n / (n - 1)
        yield (
            p.affine(p.centred / np.sqrt(unbiased + p.eps)),
            found("unbiased_variance", count=n - 1),
        )
        yield (
            p.affine(p.centred / (np.sqrt(unbiased) + p.eps)),
            found("unbiased_variance", "deviation"),
        )
    yield (
        p.affine(p.centred / (np.sqrt(p.variance) + p.eps)),
        found("epsilon", "after the root", epsilon=p.eps),
    )


def _means(case: Case) -> Candidates:
    """With the mean subtracted, and without."""
    if (p := _parts(case)) is None:
        return
    square = (p.x**2).mean(p.axes, keepdims=True)
    rms = p.affine(p.x / np.sqrt(square + p.eps))
    layer = p.affine(p.centred / np.sqrt(p.variance + p.eps))
    if case.is_right(layer):
        yield rms, found("norm_kind", "rms")
    if case.is_right(rms):
        yield layer, found("norm_kind", "layer")


def _centred_inputs(case: Case) -> Candidates:
    """Flax's E[x^2] - E[x]^2 loses digits where the mean is large: centred inputs lose none."""
    x = case.input()
    if not case.flax.get("use_fast_variance") or case.rerun is None or x is None:
        return
    if case.call is None or not case.comparable:
        return
    axes = (0, *range(2, x.ndim)) if case.kind == "batchnorm" else (x.ndim - 1,)
    mean = x.mean(axes, keepdims=True)
    name = next(k for k, v in case.call.inputs.items() if v.dtype.kind == "f")
    made = case.rerun({name: x - mean})
    if made.shape == case.right.shape and gap(made, case.right) <= case.tolerance * 3:
        worst = float(np.abs(mean).max() / max(x.std(), 1e-30))
        # How it rounds cannot be predicted: that it agrees when centred is the reason.
        yield case.target, found("fast_variance", worst=worst)
