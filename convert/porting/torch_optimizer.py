"""A torch optimizer, as it stands, as an optax transformation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from zoo.containers.errors import UsageError

Options = Mapping[str, Any]  # of one of torch's groups


def _rules() -> dict[str, Callable[[Options], Any]]:
    """torch's class -> the transformation of a group's options."""
    import optax

    from convert import optim

    def of(o: Options, *names: str) -> dict[str, Any]:
        held = {n: o[n] for n in (*names, "eps", "weight_decay", "maximize") if n in o}
        b1, b2 = o.get("betas", (None, None))
        return held if b1 is None else held | {"b1": b1, "b2": b2}

    def adam(o: Options) -> Any:
        rule = optim.adamw if o.get("decoupled_weight_decay") else optim.adam
        return rule(o["lr"], **of(o, "amsgrad"))

    def adadelta(o: Options) -> Any:
        sign = optax.scale(-1.0 if o["maximize"] else 1.0)
        decay = optax.add_decayed_weights(o["weight_decay"])
        return optax.chain(sign, decay, optax.adadelta(o["lr"], o["rho"], o["eps"]))

    def plain(rule: Callable[..., Any], *names: str) -> Callable[[Options], Any]:
        return lambda o: rule(o["lr"], **of(o, *names))

    return {
        "SGD": plain(optim.sgd, "momentum", "dampening", "nesterov"),
        "Adam": adam,
        "AdamW": plain(optim.adamw, "amsgrad"),
        "Adagrad": plain(optim.adagrad, "lr_decay", "initial_accumulator_value"),
        "RMSprop": plain(optim.rmsprop, "alpha", "momentum", "centered"),
        "NAdam": plain(optim.nadam, "momentum_decay", "decoupled_weight_decay"),
        "RAdam": plain(optim.radam, "decoupled_weight_decay"),
        "Adadelta": adadelta,
    }


def transformation(optimizer: Any, groups: Mapping[str, int | None]) -> Any:
    """The optax transformation of a torch optimizer as it stands. `groups` says for the name of
    each Flax parameter which of the optimizer's groups trains it, None for none."""
    import optax

    rules = _rules()
    cls = type(optimizer)
    if not cls.__module__.startswith("torch.optim") or cls.__name__ not in rules:
        raise UsageError(
            f"there is no transformation for {cls.__module__}.{cls.__name__}",
            f"known are {', '.join(rules)} of torch.optim; give the loss alone, and take the step "
            "with nnx.Optimizer",
        )
    plain = [
        {k: float(v) if hasattr(v, "item") else v for k, v in g.items() if k != "params"}
        for g in optimizer.param_groups
    ]
    made = [rules[cls.__name__](options) for options in plain]
    if len(made) == 1 and None not in groups.values():
        return made[0]
    names = {n: "frozen" if i is None else f"group{i}" for n, i in groups.items()}
    parts = {f"group{i}": tx for i, tx in enumerate(made)} | {"frozen": optax.set_to_zero()}
    return optax.multi_transform(parts, lambda tree: _labels(tree, names))


def _labels(tree: Any, names: Mapping[str, str]) -> Any:
    """The label of each leaf of a tree of parameters, by its path."""
    import jax

    def label(path: Any, _: Any) -> str:
        keys = [str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", "")))) for p in path]
        return names[".".join(k for k in keys if k != "value")]

    return jax.tree_util.tree_map_with_path(label, tree)
