"""Optimizers that do the same in both frameworks.

optax's own transformation where it computes what torch's does, `convert.optim`'s where it does not.
Stock Adam follows torch's rule, but not its digits: in float32 its 1 - b2^t is off by 1e-5 at the
first step, which is far more than torch's own rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from zoo.containers.errors import UsageError


@dataclass(frozen=True)
class Recipe:
    """torch's class and options, and the transformation that does the same: (rate) -> tx."""

    torch: str
    optax: Callable[[Any], Any]
    options: dict[str, Any] = field(default_factory=dict)


def _optax(name: str, **options: Any) -> Callable[[Any], Any]:
    def make(rate: Any) -> Any:
        import optax

        return getattr(optax, name)(rate, **options)

    return make


def _ours(name: str, **options: Any) -> Callable[[Any], Any]:
    def make(rate: Any) -> Any:
        from convert import optim

        return getattr(optim, name)(rate, **options)

    return make


RECIPES: dict[str, Recipe] = {
    "SGD": Recipe("SGD", _optax("sgd")),
    "SGD_momentum": Recipe("SGD", _optax("sgd", momentum=0.9), {"momentum": 0.9}),
    "SGD_nesterov": Recipe(
        "SGD", _optax("sgd", momentum=0.9, nesterov=True), {"momentum": 0.9, "nesterov": True}
    ),
    "SGD_dampening": Recipe(
        "SGD", _ours("sgd", momentum=0.9, dampening=0.1), {"momentum": 0.9, "dampening": 0.1}
    ),
    "Adam": Recipe("Adam", _ours("adam")),
    "Adam_stock": Recipe("Adam", _optax("adam")),
    "AdamW": Recipe("AdamW", _ours("adamw", weight_decay=0.01), {"weight_decay": 0.01}),
    "AdamW_stock": Recipe("AdamW", _optax("adamw", weight_decay=0.01), {"weight_decay": 0.01}),
    "AMSGrad": Recipe("Adam", _ours("adam", amsgrad=True), {"amsgrad": True}),
    "Adagrad": Recipe("Adagrad", _ours("adagrad")),
    "RMSprop": Recipe("RMSprop", _optax("rmsprop", decay=0.99, eps_in_sqrt=False)),
    "RMSprop_centered": Recipe(
        "RMSprop",
        _ours("rmsprop", centered=True, momentum=0.9),
        {"centered": True, "momentum": 0.9},
    ),
    "Adadelta": Recipe("Adadelta", _optax("adadelta", rho=0.9, eps=1e-6)),
    "NAdam": Recipe("NAdam", _ours("nadam")),
    "RAdam": Recipe("RAdam", _ours("radam")),
    "Lion": Recipe("Lion", _optax("lion", weight_decay=0.0)),
}


def recipe(name: str) -> Recipe:
    """The recipe of this name, upper or lower case. UsageError for one that there is not."""
    for known, found in RECIPES.items():
        if known.lower() == name.lower():
            return found
    raise UsageError(f"there is no optimizer {name!r}", f"there are {', '.join(RECIPES)}")


def torch_optimizer(name: str, named: Iterable[tuple[str, Any]], rate: float) -> Any:
    """The torch optimizer of named parameters: its state_dict then holds their names."""
    import torch

    found = recipe(name)
    if found.torch == "Lion":
        from training.lion_torch import Lion as Class
    else:
        Class = getattr(torch.optim, found.torch)
    return Class(list(named), lr=rate, **found.options)


def optax_transformation(name: str, rate: float, scheduled: bool) -> Any:
    """The optax transformation. Where the rate changes it is a hyper-parameter in the state, which
    the loop sets at every step, as torch's loops set `lr` in the param groups."""
    found = recipe(name)
    if not scheduled:
        return found.optax(rate)
    import optax

    return optax.inject_hyperparams(lambda learning_rate: found.optax(learning_rate))(
        learning_rate=rate
    )


def set_rate(state: Any, rate: float) -> None:
    """The rate of the next update, where the state of `optax_transformation` has it."""
    kept = getattr(state, "hyperparams", None)
    if kept is not None:
        import jax.numpy as jnp

        kept["learning_rate"] = jnp.asarray(rate, kept["learning_rate"].dtype)
