"""The optimizers that are understood: what torch calls them, and what they keep."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Collection, Mapping
from importlib.metadata import entry_points
from typing import Any

from convert.training_state import reference_rules as reference
from convert.training_state.rule import Rule, Stock

__all__ = ["PLUGINS", "RULES", "Rule", "Stock", "rule_of", "rules"]

_ADAM = ("exp_avg", "exp_avg_sq")
_BETAS = {"b1": "betas.0", "b2": "betas.1", "eps": "eps", "weight_decay": "weight_decay"}
_MEANS = (Stock({"mu": "exp_avg", "nu": "exp_avg_sq"}, counts=True, cls="ScaleByAdamState"),)

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            "SGD",
            ("momentum_buffer",),
            frozenset({"dampening", "nesterov"}),
            counts=False,
            options=("momentum", "dampening", "weight_decay", "nesterov"),
            update=reference.sgd,
            stock=(Stock({"trace": "momentum_buffer"}, counts=False, cls="TraceState"),),
            hyperparams={
                "momentum": "momentum",
                "dampening": "dampening",
                "weight_decay": "weight_decay",
            },
            transformation="optax.sgd, or convert.optim.sgd with dampening",
        ),
        Rule(
            "Adam",
            (*_ADAM, "max_exp_avg_sq"),
            frozenset({"amsgrad"}),
            needs=_ADAM,
            options=("betas", "eps", "weight_decay", "amsgrad"),
            update=reference.adam,
            stock=_MEANS,
            hyperparams=_BETAS,
            transformation="optax.adam, or convert.optim.adam(amsgrad=True) for AMSGrad",
        ),
        Rule(
            "AdamW",
            (*_ADAM, "max_exp_avg_sq"),
            frozenset({"amsgrad"}),
            needs=_ADAM,
            options=("betas", "eps", "weight_decay", "amsgrad"),
            update=reference.adamw,
            stock=_MEANS,
            hyperparams=_BETAS,
            transformation="optax.adamw, or convert.optim.adamw(amsgrad=True) for AMSGrad",
        ),
        Rule(
            "Adagrad",
            ("sum",),
            frozenset({"lr_decay", "initial_accumulator_value"}),
            needs=("sum",),
            options=("lr_decay", "eps", "weight_decay"),
            update=reference.adagrad,
            stock=(Stock({"sum_of_squares": "sum"}, counts=False, cls="ScaleByRssState"),),
            hyperparams={"lr_decay": "lr_decay", "eps": "eps", "weight_decay": "weight_decay"},
            transformation="convert.optim.adagrad",
        ),
        Rule(
            "RMSprop",
            ("square_avg", "grad_avg", "momentum_buffer"),
            frozenset({"alpha", "centered"}),
            needs=("square_avg",),
            options=("alpha", "eps", "weight_decay", "momentum", "centered"),
            update=reference.rmsprop,
            stock=(
                Stock({"nu": "square_avg"}, counts=False, cls="ScaleByRmsState"),
                Stock(
                    {"mu": "grad_avg", "nu": "square_avg"}, counts=False, cls="ScaleByRStdDevState"
                ),
            ),
            hyperparams={
                "decay": "alpha",
                "alpha": "alpha",
                "eps": "eps",
                "momentum": "momentum",
                "weight_decay": "weight_decay",
            },
            transformation="optax.rmsprop(eps_in_sqrt=False) or convert.optim.rmsprop",
        ),
        Rule(
            "Adadelta",
            ("square_avg", "acc_delta"),
            frozenset({"rho"}),
            needs=("square_avg", "acc_delta"),
            options=("rho", "eps", "weight_decay"),
            update=reference.adadelta,
            stock=(
                Stock(
                    {"e_g": "square_avg", "e_x": "acc_delta"},
                    counts=False,
                    cls="ScaleByAdaDeltaState",
                ),
            ),
            hyperparams={"rho": "rho", "eps": "eps", "weight_decay": "weight_decay"},
            transformation="optax.adadelta",
        ),
        Rule(
            "NAdam",
            (*_ADAM, "mu_product"),
            frozenset({"momentum_decay"}),
            needs=(*_ADAM, "mu_product"),
            scalars=("mu_product",),
            options=("betas", "eps", "weight_decay", "momentum_decay"),
            update=reference.nadam,
            hyperparams={**_BETAS, "momentum_decay": "momentum_decay"},
            transformation="convert.optim.nadam",
        ),
        Rule(
            "RAdam",
            _ADAM,
            frozenset(),
            needs=_ADAM,
            options=("betas", "eps", "weight_decay"),
            update=reference.radam,
            stock=_MEANS,
            hyperparams=_BETAS,
            transformation="convert.optim.radam",
            fits=lambda options, slots: (
                {"betas", "eps"} <= options.keys() and set(slots) <= {*_ADAM}
            ),
        ),
    )
}

# Optimizers that are not torch's own come as "module:Rule": these, and the entry points of the
# group `zooconvert.optimizers` in any package.
PLUGINS = ("convert.training_state.lion:RULE",)


@functools.cache
def rules() -> dict[str, Rule]:
    """Name -> Rule of all that are understood, plugins included. A plugin cannot replace one."""
    found = dict(RULES)
    for target in PLUGINS:
        module, _, attribute = target.partition(":")
        rule: Rule = getattr(importlib.import_module(module), attribute)
        found[rule.name] = rule
    for point in entry_points(group="zooconvert.optimizers"):
        try:
            found.setdefault((rule := point.load()).name, rule)
        except Exception as e:  # whatever a stranger's module raises, the others are still there
            warnings.warn(f"the plugin {point.name} ({point.value}) is broken: {e}", stacklevel=2)
    return found


def rule_of(options: Mapping[str, Any], slots: Collection[str]) -> str | None:
    """The rule whose options and slots these are, None for none that is known.

    Before torch 2.8, Adam and AdamW have equal options: then it is "Adam", and whoever fills an
    optimizer knows which. Weight decay is not part of the state.
    """
    for rule in rules().values():
        if rule.marks and rule.marks <= options.keys() and set(slots) <= set(rule.slots):
            if rule.name == "Adam" and options.get("decoupled_weight_decay"):
                return "AdamW"
            return rule.name
    for rule in rules().values():
        if rule.fits is not None and rule.fits(options, slots):
            return rule.name
    return None
