"""The optimizers that are understood: what torch calls them, and what they keep."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """One torch optimizer. `slots` may be kept (some only with certain options), `marks` are
    options that no other optimizer here has: a torch state_dict does not say its class."""

    name: str
    slots: tuple[str, ...]
    marks: frozenset[str]
    counts: bool = True  # keeps the number of steps


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("SGD", ("momentum_buffer",), frozenset({"dampening", "nesterov"}), counts=False),
        Rule("Adam", ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), frozenset({"amsgrad"})),
        Rule("AdamW", ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), frozenset({"amsgrad"})),
        Rule("Adagrad", ("sum",), frozenset({"lr_decay", "initial_accumulator_value"})),
        Rule(
            "RMSprop",
            ("square_avg", "grad_avg", "momentum_buffer"),
            frozenset({"alpha", "centered"}),
        ),
        Rule("Adadelta", ("square_avg", "acc_delta"), frozenset({"rho"})),
        Rule("NAdam", ("exp_avg", "exp_avg_sq", "mu_product"), frozenset({"momentum_decay"})),
        Rule("RAdam", ("exp_avg", "exp_avg_sq"), frozenset()),
        Rule("Lion", ("exp_avg",), frozenset(), counts=False),
    )
}


def rule_of(options: Mapping[str, Any], slots: Collection[str]) -> str | None:
    """The rule whose options and slots these are, None for none that is known.

    Before torch 2.8, Adam and AdamW have equal options: then it is "Adam", and whoever fills an
    optimizer knows which. Weight decay is no part of the state.
    """
    for rule in RULES.values():
        if rule.marks and rule.marks <= options.keys() and set(slots) <= set(rule.slots):
            if rule.name == "Adam" and options.get("decoupled_weight_decay"):
                return "AdamW"
            return rule.name
    if {"betas", "eps"} <= options.keys() and set(slots) <= {"exp_avg", "exp_avg_sq"}:
        return "RAdam"
    if "betas" in options and "eps" not in options and set(slots) <= {"exp_avg"}:
        return "Lion"
    return None
