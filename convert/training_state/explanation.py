"""Why a transformation's update is not the rule's: another rule, or another hyper-parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from convert.training_state.elements import Elements, against
from convert.training_state.reference_rules import Options, stock
from convert.training_state.rules import Rule, rules

_SIEVE = 64  # elements that values are tried on, before they are tried on all


@dataclass(frozen=True)
class Explanation:
    """`near` says that the difference is small enough to go ahead, at this `rate`."""

    text: str
    rate: float
    near: bool = False


class _Variant(NamedTuple):
    """A rule that is followed in place of torch's, and what to say then."""

    text: str
    rule: Rule
    options: Options
    near: bool = False


def explain(
    rule: Rule, elements: Elements, options: Options, bad: np.ndarray, rate: float
) -> Explanation | None:
    """The first other rule, or value of one hyper-parameter, under which the update is the rule's.

    `bad` are the elements whose update is not; `rate` is the factor that most have. None where
    nothing explains it: a value is found where it has one digit or two, or as many nines.
    """
    fixed = None
    if bad.sum() * 2 < bad.size:  # most parameters are right: only the others need a reason
        elements, fixed = elements.only(np.isin(elements.names, elements.names[bad])), rate
    as_torch = _Variant("", rule, options)
    variants = list(_variants(rule, options))
    for v in variants:
        found, off = against(elements, v.rule, v.options, fixed)
        if not off.any():
            return Explanation(v.text, float(found), v.near)
    for v in (as_torch, *variants):
        for key in _numbers(v.rule, v.options):
            value = _solve(elements, v, key, fixed)
            if value is not None:
                title = f"its {_title(key)} is {value:.6g}, not {_get(options, key):.6g}"
                return Explanation(" and ".join(filter(None, (title, v.text))), rate)
    return None


# --- Other rules: what stock transformations do, by those themselves ---


def _stock_adam(o: Options) -> Any:
    import optax

    root, nesterov = o.get("eps_root", 0.0), bool(o.get("nesterov"))
    return optax.scale_by_adam(*o["betas"], o["eps"], root, nesterov=nesterov)


def _stock_radam(o: Options) -> Any:
    import optax

    return optax.scale_by_radam(*o["betas"], o["eps"])


def _stock_adagrad(o: Options) -> Any:
    import optax

    return optax.scale_by_rss(0.0, o["eps"])


def _stock_rmsprop(o: Options) -> Any:
    import optax

    scale = optax.scale_by_stddev if o["centered"] else optax.scale_by_rms
    rule = scale(o["alpha"], o["eps"], eps_in_sqrt=o["eps_in_sqrt"])
    if np.ndim(o["momentum"]) == 0 and not o["momentum"]:
        return rule
    return optax.chain(rule, optax.trace(o["momentum"], nesterov=bool(o.get("nesterov"))))


STOCK: dict[str, tuple[Callable[[Options], Any], Mapping[str, str]]] = {
    "Adam": (_stock_adam, {"mu": "exp_avg", "nu": "exp_avg_sq"}),
    "RAdam": (_stock_radam, {"mu": "exp_avg", "nu": "exp_avg_sq"}),
    "Adagrad": (_stock_adagrad, {"sum_of_squares": "sum"}),
    "RMSprop": (
        _stock_rmsprop,
        {"mu": "grad_avg", "nu": "square_avg", "trace": "momentum_buffer"},
    ),
}


def _variants(rule: Rule, o: Options) -> Iterator[_Variant]:
    """The other rules that stock transformations follow."""
    decoupled = bool(o.get("decoupled_weight_decay", rule.name == "AdamW"))
    o = {**o, "decoupled_weight_decay": decoupled}
    name = rule.name.removesuffix("W")
    own = replace(rule, update=stock(*STOCK[name])) if name in STOCK else rule
    if name == "Adagrad":
        yield _Variant("its eps stands inside the root", own, o)
    if name == "RMSprop":
        yield _Variant("its eps stands inside the root", own, {**o, "eps_in_sqrt": True})
        if o["momentum"]:
            nesterov = {**o, "nesterov": True, "eps_in_sqrt": False}
            yield _Variant("its nesterov is True, not False", own, nesterov)
    if name == "RAdam":
        told = (
            "optax.radam adds eps after the bias correction, torch before: the update differs by "
            "parts in a million where gradients are small; convert.optim.radam is exact"
        )
        yield _Variant(told, own, o, near=o["eps"] <= 1e-8)
    if name == "Adam" and not o["amsgrad"]:
        yield _Variant("its nesterov is True, not False", own, {**o, "nesterov": True})
        yield _Variant("", replace(own, options=("eps_root",)), o)
    if name == "SGD" and o["momentum"] and not o["dampening"]:
        other = not o["nesterov"]
        yield _Variant(f"its nesterov is {other}, not {not other}", rule, {**o, "nesterov": other})
    other = not o.get("maximize", False)
    told = "it ascends (maximize), the checkpoint descends"
    told = told if other else "it descends, the checkpoint ascends"
    yield _Variant(told, rule, {**o, "maximize": other})
    if o.get("dampening"):
        told = f"it has no dampening, the checkpoint {o['dampening']:.6g}"
        yield _Variant(told, rule, {**o, "dampening": 0.0})
    if o.get("weight_decay") and rule.name in ("Adam", "AdamW", "NAdam", "RAdam"):
        told = (
            "its weight decay is added to the gradient, not decoupled"
            if decoupled
            else "its weight decay is decoupled, not added to the gradient"
        )
        yield _Variant(told, rule, {**o, "decoupled_weight_decay": not decoupled})
    if name in ("Adam", "RAdam"):
        other_name = "RAdam" if name == "Adam" else "Adam"
        yield _Variant(f"it follows {other_name}'s rule", rules()[other_name], o)


# --- Other hyper-parameters ---

_DECAYS = ("betas.0", "betas.1", "momentum", "alpha", "rho", "dampening")
_ORDER = ("weight_decay", "eps", "eps_root", "momentum", "alpha", "rho", "dampening", "lr_decay")


def _written(decay: bool) -> np.ndarray:
    """What somebody would write: 0; one digit, then two; of decays their distance from 1."""
    digits = (*range(1, 10), *(n for n in range(11, 100) if n % 10))
    found = [0.0, *(float(f"{n}e-{k}") for n in digits for k in range(7 if decay else 17))]
    if decay:
        found = [0.0, *(float(f"{1 - x:.10f}") for x in found[1:] if x <= 1)]
    return np.array(found)


def _numbers(rule: Rule, options: Options) -> Iterator[str]:
    """The hyper-parameters that are numbers, the likeliest first."""
    for key in _ORDER:
        pointless = {"momentum": not options.get(key), "dampening": options.get("nesterov")}
        if key in rule.options and not pointless.get(key):
            yield key
    if "betas" in rule.options:
        yield from ("betas.0", "betas.1")
    if "momentum_decay" in rule.options:
        yield "momentum_decay"


def _solve(elements: Elements, v: _Variant, key: str, rate: float | None) -> float | None:
    """The value of one hyper-parameter that explains the update; None if none does."""
    off = np.flatnonzero(against(elements, v.rule, v.options, rate)[1])
    few = elements.only(off[np.linspace(0, off.size - 1, _SIEVE).astype(int)])
    values = _written(key in _DECAYS)
    try:
        _, bad = against(few, v.rule, _with(v.options, key, values[:, None]), rate)
    except Exception:  # a plugin's rule may be unable to take columns
        return None
    for value in map(float, values[~bad.any(axis=-1)]):
        if not against(elements, v.rule, _with(v.options, key, value), rate)[1].any():
            return value
    return None


def _title(key: str) -> str:
    return {"betas.0": "b1", "betas.1": "b2", "alpha": "decay (alpha)"}.get(key, key)


def _get(options: Options, key: str) -> float:
    name, _, index = key.partition(".")
    value = options.get(name, 0.0)
    return float(value[int(index)] if index else value)


def _with(options: Options, key: str, value: Any) -> Options:
    name, _, index = key.partition(".")
    if not index:
        return {**options, name: value}
    both = list(options[name])
    both[int(index)] = value
    return {**options, name: tuple(both)}
