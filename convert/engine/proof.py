"""A conversion at a level above bits: the twins run on what was converted."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from convert.compare.report import Report
from convert.compare.settings import Level, Settings
from zoo.checkpoint.plan import Plan
from zoo.containers.errors import NotEquivalent


def prove(plan: Plan, canonical: Mapping[str, np.ndarray], level: Level) -> dict[str, object]:
    """Run both twins of the plan's model as far as `level` asks for; what was found, for the
    certificate. NotEquivalent where they differ.

    Source and result hold the same bits, which has just been seen: `canonical` stands for both.
    """
    from convert.compare.checkpoints import Weights, run_twins

    report = Report("torch", "flax", level)
    sides = [Weights(framework, plan.config, canonical) for framework in ("torch", "flax")]
    run_twins(plan.family, sides[0], sides[1], report, None, Settings())
    first = report.first_divergence
    if first is not None and first.cause == "not_finite":
        raise NotEquivalent(first.diagnosis, f"{first.advice}, or convert it at level 'bits'")
    if report.verdict == "different":
        bad = next(row.name for row in report.rows if row.judged and not row.same)
        raise NotEquivalent(
            f"the result computes something else, first in {bad}",
            "nothing was kept; the model's twins differ, please report it",
        )
    worst = report.worst
    assert worst is not None
    found: dict[str, object] = {
        "level": level,
        "outputs": len(report.outputs),
        "worst": {
            "name": worst.name,
            "error": worst.error,
            "noise": worst.noise,
            "ratio": worst.ratio,
        },
    }
    if level != "outputs":
        found["gradients"] = len(report.gradients)
    if level == "training":
        found["training"] = {t.optimizer: t.steps for t in report.training}
    return found
