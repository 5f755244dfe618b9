"""What has to be said of an optimizer so that its states can be moved."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

Update = Callable[[Mapping[str, Any], dict[str, Any], Any, Any, Any], tuple[Any, dict[str, Any]]]


@dataclass(frozen=True)
class Stock:
    """How a transformation that is not ours keeps slots: `fields` of its state -> torch's slot.

    `counts` says whether the same state has a field `count`; by both it is recognised, and in a
    live tree by the name of its class too, where `cls` says one.
    """

    fields: Mapping[str, str]
    counts: bool
    cls: str = ""


@dataclass(frozen=True)
class Rule:
    """One torch optimizer.

    `slots` may be kept (some only with certain options), `needs` are those that always are once it
    has stepped. `marks` are options that no other optimizer here has: a torch state_dict does not
    say its class; where that is not enough, `fits(options, slots)` decides. `options` are those
    that `update` must be told. A plugin gives a Rule under the entry point group
    `zooconvert.optimizers`.

    `update(options, slots, t, gradients, parameters)` is the rule in NumPy float64, for the options
    of a param group, slots by name, and the number `t` of this update (1 for the first); arrays are
    of one shape, or scalars. It gives the direction (parameters change by -lr times it) and what is
    kept then. It is also called with an option that is a column of values, to find the one that
    explains a difference, and then gives a row for each.
    """

    name: str
    slots: tuple[str, ...]
    marks: frozenset[str]
    counts: bool = True  # keeps the number of steps
    needs: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ()  # slots that are one number for a parameter
    options: tuple[str, ...] = ()
    update: Update | None = None
    stock: tuple[Stock, ...] = ()
    # What `optax.inject_hyperparams` calls a hyper-parameter -> torch's option, "betas.0" within.
    hyperparams: Mapping[str, str] = field(default_factory=dict)
    transformation: str = ""  # the optax transformation that follows this rule
    fits: Callable[[Mapping[str, Any], Collection[str]], bool] | None = None

    @property
    def stock_fields(self) -> dict[str, str]:
        """Field -> slot of all the transformations in `stock`."""
        return {f: slot for stock in self.stock for f, slot in stock.fields.items()}

    def kept(self, options: Mapping[str, Any]) -> set[str]:
        """The slots that torch keeps for a parameter that has stepped under these options."""
        optional = {
            "momentum_buffer": options.get("momentum"),
            "grad_avg": options.get("centered"),
            "max_exp_avg_sq": options.get("amsgrad"),
        }
        return {s for s in self.slots if optional.get(s, True) or s in self.needs}

    def knows(self, options: Mapping[str, Any]) -> bool:
        """Whether these options tell all that the rule must be told."""
        return all(options.get(name) is not None for name in self.options)
