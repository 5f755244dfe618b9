"""torch.optim's rules, by transformations that follow them: what others are held against.

`convert.optim` states a rule where optax's own is another; Adadelta's is optax's. Tests hold both
against torch.optim. Here they get the form of `Rule.update`. JAX is imported by the first update.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert import optim
from convert.training_state.rule import Rule, Update
from zoo.containers.errors import UsageError

TOLERANCE = 8 * 2.0**-23  # hyper-parameters may be held as float32 arrays

Options = Mapping[str, Any]


def by(make: Callable[[Options], Any], fields: Mapping[str, str] | None = None) -> Update:
    """The rule of the transformations that `make` gives for torch's options, at a rate of 1.

    Their states' fields have the names of torch's slots, but for those in `fields`: field -> slot.
    """
    slot_of = dict(fields or {})

    def update(o: Options, s: dict[str, Any], t: Any, g: Any, p: Any) -> tuple[Any, dict[str, Any]]:
        import jax
        import jax.numpy as jnp

        def filled(state: Any) -> Any:
            slots = {f: slot_of.get(f, f) for f in state._fields}
            there = {f: jnp.asarray(s[slot]) for f, slot in slots.items() if slot in s}
            if "count" in slots:  # one for each element, where they differ
                there["count"] = jnp.asarray(np.asarray(t) - 1, jnp.int32)
            return state._replace(**there)

        with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
            transformation = make(o)
            gradients, params = jnp.asarray(g), jnp.asarray(p)
            before = jax.tree.map(filled, transformation.init(params), is_leaf=_is_state)
            updates, after = transformation.update(gradients, before, params)
            states = [x for x in jax.tree.leaves(after, is_leaf=_is_state) if _is_state(x)]
            kept = {slot_of.get(f, f): v for x in states for f, v in x._asdict().items()}
            found = {slot: np.asarray(v) for slot, v in kept.items() if isinstance(v, jax.Array)}
            return -np.asarray(updates), {k: v for k, v in found.items() if k != "count"}

    return update


def _is_state(node: Any) -> bool:
    return hasattr(node, "_fields")


def with_options(make: Callable[..., Any], o: Options) -> Any:
    """`make` called with those of torch's options that its parameters have the names of."""
    b1, b2 = o.get("betas", (None, None))
    told = {**o, "learning_rate": 1.0, "b1": b1, "b2": b2}
    names = inspect.signature(make).parameters
    try:
        return make(**{name: told[name] for name in names if told.get(name) is not None})
    except ValueError as e:
        raise UsageError(
            f"the checkpoint's options are none that torch takes: {e}",
            "check=False fills the transformation all the same",
        ) from None


def stock(core: Callable[[Options], Any], fields: Mapping[str, str]) -> Update:
    """The rule of an optax transformation, with torch's weight decay and `maximize` around it."""

    def make(o: Options) -> Any:
        import optax

        decay = optax.add_decayed_weights(o.get("weight_decay", 0.0))
        rule = (core(o), decay) if o.get("decoupled_weight_decay") else (decay, core(o))
        sign = -1.0 if o.get("maximize") else 1.0
        return optax.chain(optax.scale(sign), *rule, optax.scale(-1.0))

    return by(make, fields)


def _adam(o: Options) -> Any:
    return with_options(optim.adamw if o.get("decoupled_weight_decay") else optim.adam, o)


def _adadelta(o: Options) -> Any:
    import optax

    return with_options(optax.scale_by_adadelta, o)


def sgd(o: Options, s: dict[str, Any], t: Any, g: Any, p: Any) -> tuple[Any, dict[str, Any]]:
    """torch does not count SGD's updates: without a buffer yet, this is the first."""
    first = "momentum_buffer" not in s
    return by(lambda o: with_options(optim.sgd, o))(o, s, 1 if first else 2, g, p)


adam = by(_adam)
adamw = by(lambda o: _adam({"decoupled_weight_decay": True, **o}))
adagrad = by(lambda o: with_options(optim.adagrad, o))
rmsprop = by(lambda o: with_options(optim.rmsprop, o))
adadelta = stock(_adadelta, {"e_g": "square_avg", "e_x": "acc_delta"})
nadam = by(lambda o: with_options(optim.nadam, o))
radam = by(lambda o: with_options(optim.radam, o))


@dataclass
class Elements:
    """All elements of the parameters of one group in a row: float64 arrays of one length."""

    names: np.ndarray  # of the parameter that each is of
    u: np.ndarray  # updates
    g: np.ndarray  # gradients
    p: np.ndarray  # parameters
    t: np.ndarray  # the number of this update, 1 for the first
    slots: dict[str, np.ndarray]

    def only(self, pick: np.ndarray) -> Elements:
        """Some of them, by mask or by indices."""
        slots = {slot: values[pick] for slot, values in self.slots.items()}
        u, g, p, t = (x[pick] for x in (self.u, self.g, self.p, self.t))
        return Elements(self.names[pick], u, g, p, t, slots)


def against(
    elements: Elements, rule: Rule, options: Options, rate: Any = None
) -> tuple[Any, np.ndarray]:
    """The factor between the updates and the rule's, and which elements have another.

    The factor is `rate` where that is given. An option that is a column of values gives a row of
    both for each.
    """
    assert rule.update is not None
    u = elements.u
    with np.errstate(all="ignore"):
        found, _ = rule.update(options, dict(elements.slots), elements.t, elements.g, elements.p)
        d = np.asarray(found, np.float64)
        if rate is None:
            ratio = np.where(d != 0, -u / d, np.nan)
            ratio[~np.isfinite(ratio)] = np.nan
            ratio[np.isnan(ratio).all(axis=-1)] = 0.0
            rate = np.nanmedian(ratio, axis=-1, keepdims=ratio.ndim > 1)
        off = np.abs(u + rate * d)
        bad = ~(off <= TOLERANCE * np.maximum(np.abs(u), np.abs(rate * d)))
    return rate, bad
