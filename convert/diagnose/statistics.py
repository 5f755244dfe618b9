"""Running statistics of BatchNorm after one step in train mode."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from convert.diagnose.case import Candidates, Case, first_fit
from convert.diagnose.causes import Reason, found
from convert.diagnose.divergence import Divergence
from convert.diagnose.matched import Matched
from convert.diagnose.reference import Reference
from convert.diagnose.walk import Forward
from convert.runtime.arrays import to_numpy


def running_statistics(reference: Reference, walk: Forward, matched: Matched) -> Divergence | None:
    """The first layer, in torch's order, whose running statistics moved to other values."""
    order = {n: i for i, n in enumerate(reference.order)}
    matches = [m for m in matched.matches if m.torch[0] in reference.after]
    for match in sorted(matches, key=lambda m: order.get(m.torch[0].rpartition(".")[0], 0)):
        if not all(n in walk.values_after for n in match.flax):
            continue
        made = matched.to_torch(match, [to_numpy(walk.values_after[n]) for n in match.flax])
        for name, given in zip(match.torch, made, strict=True):
            if given.dtype.kind != "f":
                continue
            judged = reference.judge(reference.after[name], reference.after_exact[name], given)
            if not judged.same:
                layer = name.rpartition(".")[0]
                pair = next((p for p in walk.pairs.values() if p.torch == layer), None)
                return Divergence.of(
                    layer,
                    _why(reference, name, given, judged.tolerance),
                    judged,
                    direction="training",
                    flax_layer=pair.flax if pair else None,
                    tensor=name,
                )
    return None


def _why(reference: Reference, name: str, given: np.ndarray, tolerance: float) -> Reason:
    layer, _, leaf = name.rpartition(".")
    right = reference.after_exact[name].astype(np.float64)
    case = Case([given.astype(np.float64)], right, tolerance, "batchnorm", reference.modules[layer])

    def updates(case: Case) -> Candidates:
        calls = [c for c in reference.trace.calls if c.name == layer]
        momentum = getattr(case.module, "momentum", None)
        if len(calls) == 1 and momentum is not None:
            x = next(v for v in calls[0].inputs.values() if v.dtype.kind == "f")
            before = reference.before[name].astype(np.float64)
            yield from _updates(case, before, x.astype(np.float64), leaf, momentum)

    return first_fit(case, updates) or found("unknown", "statistics", name=leaf)


def _updates(
    case: Case, before: np.ndarray, x: np.ndarray, leaf: str, momentum: float
) -> Candidates:
    """Where the statistics would be with other shares of the batch and other variances."""
    yield before, found("statistics", name=leaf)
    if leaf not in ("running_mean", "running_var"):
        return
    axes = (0, *range(2, x.ndim))
    n = x.size // x.shape[1]
    biased = x.var(axes)
    batch = x.mean(axes) if leaf == "running_mean" else biased * n / max(n - 1, 1)
    for share in _shares(case.target, before, batch, momentum):
        if share != momentum:
            yield (1 - share) * before + share * batch, found(
                "momentum",
                "complement" if share == 1 - momentum else "",
                name=leaf, flax=share, torch=momentum, kept=1 - momentum,
            )  # fmt: skip
    if leaf == "running_var":
        for share in _shares(case.target, before, biased, momentum):
            yield (1 - share) * before + share * biased, _biased(leaf, share, momentum, n - 1)


def _biased(leaf: str, share: float, momentum: float, count: int) -> Reason:
    if share == momentum:
        return found("unbiased_variance", "running", name=leaf, count=count)
    return found(
        "momentum",
        "complement, biased" if share == 1 - momentum else "biased",
        name=leaf, flax=share, torch=momentum, kept=1 - momentum, count=count,
    )  # fmt: skip


def _shares(
    given: np.ndarray, before: np.ndarray, new: np.ndarray, momentum: float
) -> Iterator[float]:
    """How much of the batch may go into the statistics: torch's share, its complement, what fits"""
    yield from (momentum, 1 - momentum)
    step = new - before
    if step.any():
        yield float(((given - before) * step).sum() / (step * step).sum())
