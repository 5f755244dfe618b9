"""torch.optim's rules, by transformations that follow them: what others are held against.

`convert.optim` states a rule where optax's own is another; Adadelta's is optax's. Tests hold both
against torch.optim. Here they get the form of `Rule.update`. JAX is imported by the first update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from convert import optim
from convert.training_state.rule import Update
from zoo.containers.errors import UsageError

Options = Mapping[str, Any]
Make = Callable[[Options], Any]


def by(make: Make, fields: Mapping[str, str] | None = None) -> Update:
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


def stock(core: Make, fields: Mapping[str, str]) -> Update:
    """The rule of an optax transformation, with torch's weight decay and `maximize` around it."""

    def make(o: Options) -> Any:
        import optax

        decay = optax.add_decayed_weights(o.get("weight_decay", 0.0))
        rule = (core(o), decay) if o.get("decoupled_weight_decay") else (decay, core(o))
        sign = -1.0 if o.get("maximize") else 1.0
        return optax.chain(optax.scale(sign), *rule, optax.scale(-1.0))

    return by(make, fields)


def _common(o: Options) -> dict[str, Any]:
    return {"weight_decay": o.get("weight_decay", 0.0), "maximize": bool(o.get("maximize"))}


def _betas(o: Options) -> dict[str, Any]:
    return {"b1": o["betas"][0], "b2": o["betas"][1], "eps": o["eps"]}


def _sgd(o: Options) -> Any:
    try:
        return optim.sgd(
            1.0, o["momentum"], o["dampening"], nesterov=bool(o["nesterov"]), **_common(o)
        )
    except ValueError as e:
        raise UsageError(
            f"the checkpoint's options are none that torch.optim.SGD takes: {e}",
            "check=False fills the transformation all the same",
        ) from None


def sgd(o: Options, s: dict[str, Any], t: Any, g: Any, p: Any) -> tuple[Any, dict[str, Any]]:
    """torch does not count SGD's updates: without a buffer yet, this is the first."""
    return by(_sgd)(o, s, 2 if "momentum_buffer" in s else 1, g, p)


def _adam(o: Options) -> Any:
    make = optim.adamw if o.get("decoupled_weight_decay") else optim.adam
    return make(1.0, **_betas(o), **_common(o), amsgrad=bool(o.get("amsgrad")))


adam = by(_adam)
adamw = by(lambda o: _adam({"decoupled_weight_decay": True, **o}))
adagrad = by(lambda o: optim.adagrad(1.0, o["lr_decay"], eps=o["eps"], **_common(o)))
rmsprop = by(
    lambda o: optim.rmsprop(
        1.0,
        o["alpha"],
        o["eps"],
        momentum=o["momentum"],
        centered=bool(o["centered"]),
        **_common(o),
    )
)
nadam = by(
    lambda o: optim.nadam(
        1.0,
        **_betas(o),
        **_common(o),
        momentum_decay=o["momentum_decay"],
        decoupled_weight_decay=bool(o.get("decoupled_weight_decay")),
    )
)
radam = by(
    lambda o: optim.radam(
        1.0,
        **_betas(o),
        **_common(o),
        decoupled_weight_decay=bool(o.get("decoupled_weight_decay")),
    )
)


def _adadelta(o: Options) -> Any:
    import optax

    return optax.scale_by_adadelta(o["rho"], o["eps"])


adadelta = stock(_adadelta, {"e_g": "square_avg", "e_x": "acc_delta"})
