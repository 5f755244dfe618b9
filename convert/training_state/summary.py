"""A training state in a few words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.training_state import storage
from convert.training_state.state import TrainingState

_COUNTERS = ("epoch", "global_step", "step", "iteration")


def summary(state: TrainingState) -> dict[str, Any]:
    """What is there, as data for JSON; no array is read."""
    tensors = storage.header(state)
    return {
        "optimizers": [
            {
                "name": o.name,
                "rule": o.rule,
                "parameters": len(o.params),
                "groups": [dict(g.options) | {"parameters": len(g.params)} for g in o.groups],
                "moments": sum(len(arrays) for arrays in o.slots.values()),
                "step": max(o.steps.values(), default=None),
            }
            for o in state.optimizers
        ],
        "averages": len(state.ema),
        "data": list(state.data),
        "counters": {n: state.data[n] for n in _COUNTERS if _is_number(state.data.get(n))},
        "tensors": len(tensors),
        "bytes": sum(info.nbytes for info in tensors.values()),
    }


def line(told: Mapping[str, Any]) -> str:
    """The summary in one line; "" where nothing is there."""
    parts = []
    for o in told["optimizers"]:
        name = f" {o['name']}" if o["name"] else ""
        step = "" if o["step"] is None else f", step {o['step']}"
        parts.append(f"optimizer{name}: {o['rule']}, {o['moments']} moments{step}")
    if told["averages"]:
        parts.append(f"averaged weights: {told['averages']} tensors")
    if told["data"]:
        counters = [f"{name} {value}" for name, value in told["counters"].items()]
        if more := len(told["data"]) - len(counters):
            what = "value" if more == 1 else "values"
            counters.append(f"{more} more {what}" if counters else f"{more} {what}")
        parts.append(f"training data: {', '.join(counters)}")
    return "; ".join(parts)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
