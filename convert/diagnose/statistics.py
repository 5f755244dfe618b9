"""Running statistics of BatchNorm after one step in train mode."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from convert.diagnose.case import Candidates, Case, Finding, first_fit
from convert.diagnose.divergence import Divergence
from convert.diagnose.matched import Matched
from convert.diagnose.reference import Reference
from convert.diagnose.walk import Forward
from convert.runtime.arrays import to_numpy


def running_statistics(reference: Reference, walk: Forward, matched: Matched) -> Divergence | None:
    """The first layer, in torch's order, whose running statistics moved to other values."""
    order = {n: i for i, n in enumerate(reference.order)}
    found = [m for m in matched.matches if m.torch[0] in reference.after]
    for match in sorted(found, key=lambda m: order.get(m.torch[0].rpartition(".")[0], 0)):
        if not all(n in walk.values_after for n in match.flax):
            continue
        made = matched.to_torch(match, [to_numpy(walk.values_after[n]) for n in match.flax])
        for name, given in zip(match.torch, made, strict=True):
            if given.dtype.kind != "f":
                continue
            judged = reference.judge(reference.after[name], reference.after_exact[name], given)
            if not judged.same:
                finding = _why(reference, name, given, judged.tolerance)
                layer = name.rpartition(".")[0]
                pair = next((p for p in walk.pairs.values() if p.torch == layer), None)
                return Divergence(
                    layer, finding.diagnosis, finding.cause, finding.advice, "training",
                    pair.flax if pair else None, None, name,
                    judged.error, judged.noise, judged.scale,
                )  # fmt: skip
    return None


def _why(reference: Reference, name: str, given: np.ndarray, tolerance: float) -> Finding:
    layer, _, leaf = name.rpartition(".")
    calls = [c for c in reference.trace.calls if c.name == layer]
    module = reference.modules[layer]
    right = reference.after_exact[name].astype(np.float64)
    case = Case([given.astype(np.float64)], right, tolerance, "batchnorm", module)
    momentum = getattr(module, "momentum", None)
    if len(calls) == 1 and momentum is not None:
        x = next(v for v in calls[0].inputs.values() if v.dtype.kind == "f").astype(np.float64)
        before = reference.before[name].astype(np.float64)
        if (finding := first_fit(case, _updates(case, before, x, leaf, momentum))) is not None:
            return finding
    return Finding("unknown", f"{leaf} moves to other values than torch's; no known cause fits",
                   "compare how both update it")  # fmt: skip


def _updates(
    case: Case, before: np.ndarray, x: np.ndarray, leaf: str, momentum: float
) -> Candidates:
    """Where the statistics would be with other shares of the batch and other variances."""
    axes = (0, *range(2, x.ndim))
    n = x.size // x.shape[1]
    biased = x.var(axes)
    both = {
        "running_mean": [("", x.mean(axes))],
        "running_var": [("", biased * n / max(n - 1, 1)), ("biased", biased)],
    }
    yield (
        before,
        Finding(
            "statistics", f"{leaf} does not move in Flax", "mutable=['batch_stats'], in train mode"
        ),
    )
    for word, new in both.get(leaf, []):
        for share, told in _shares(case.target, before, new, momentum):
            causes = ["momentum"] if share != momentum else []
            causes += ["unbiased_variance"] if word else []
            if not causes:
                continue
            what = f"{leaf} {told}" if share != momentum else leaf
            if word:
                what += (
                    f" moves towards the biased variance in Flax, torch's is over n - 1 = {n - 1}"
                )
            advice = (
                f"momentum={1 - momentum:g} in Flax, where it is the share of the old value"
                if share != momentum
                else "multiply the batch's variance by n / (n - 1) before it is averaged in"
            )
            yield (1 - share) * before + share * new, Finding(causes[0], what, advice)


def _shares(
    given: np.ndarray, before: np.ndarray, new: np.ndarray, momentum: float
) -> Iterator[tuple[float, str]]:
    yield momentum, ""
    word = "takes {:.4g} of the batch in Flax, {:.4g} in torch"
    yield 1 - momentum, word.format(1 - momentum, momentum) + ": momentum is the complement"
    step = new - before
    if step.any():
        fitted = float(((given - before) * step).sum() / (step * step).sum())
        yield fitted, word.format(fitted, momentum)
