"""Whether the twins of what a checkpoint holds can be run: apart, since every conversion asks."""

from __future__ import annotations

from zoo.checkpoint.plan import Plan
from zoo.containers.errors import UsageError
from zoo.model import Model


def runnable(*plans: Plan) -> Model:
    """The family whose twins can be run; UsageError where there is none, or where none of these
    tells a field that running them needs."""
    if unknown := plans[0].unknown.intersection(*(p.unknown for p in plans[1:])):
        raise UsageError(
            f"running the model needs {', '.join(sorted(unknown))}, which the tensors do not tell",
            "name a preset with --model, or give its config.json with --config",
        )
    return plans[0].family
