"""Why a transformation's update is not the rule's: another rule, or another hyper-parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from convert.training_state.reference_rules import Elements, Options, against, stock, with_options
from convert.training_state.rule import Update
from convert.training_state.rules import RULES, Rule, rules


class Explanation(NamedTuple):
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
) -> Explanation:
    """The first other rule, or value of one hyper-parameter, under which the update is the rule's.

    `bad` are the elements whose update is not; `rate` is the factor that most have.
    """
    fixed = None
    if bad.sum() * 2 < bad.size:  # most parameters are right: only the others need a reason
        elements, fixed = elements.only(np.isin(elements.names, elements.names[bad])), rate
    variants = list(_variants(rule, options))
    for v in variants:
        found, off = against(elements, v.rule, v.options, fixed)
        if not off.any():
            return Explanation(v.text, float(found), v.near)
    for v in (_Variant("", rule, options), *variants):
        for key in _numbers(v):
            if (value := _solve(elements, v, key, fixed)) is not None:
                title = _TITLES.get(key, key)
                text = f"its {title} is {value:.6g}, not {_get(options, key):.6g}"
                return Explanation(f"{text} and {v.text}" if v.text else text, rate)
    text = f"its update is not {rule.name}'s, and no one hyper-parameter explains it"
    return Explanation(text, rate)


# --- Other rules: what stock transformations do, by those themselves ---


def _scale_by(name: str) -> Callable[[Options], Any]:
    def core(o: Options) -> Any:
        import optax

        return with_options(getattr(optax, f"scale_by_{name}"), o)

    return core


def _rmsprop(o: Options) -> Any:
    import optax

    scaled = _scale_by("stddev" if o["centered"] else "rms")({**o, "decay": o["alpha"]})
    if np.ndim(o["momentum"]) == 0 and not o["momentum"]:
        return scaled
    return optax.chain(scaled, optax.trace(o["momentum"], bool(o.get("nesterov"))))


_CORES = {
    "Adam": _scale_by("adam"),
    "RAdam": _scale_by("radam"),
    "Adagrad": _scale_by("rss"),
    "RMSprop": _rmsprop,
}
STOCK: dict[str, Update] = {
    name: stock(core, {"trace": "momentum_buffer"} | RULES[name].stock_fields)
    for name, core in _CORES.items()
}


def _variants(rule: Rule, o: Options) -> Iterator[_Variant]:
    """The other rules that stock transformations follow."""
    decoupled = bool(o.get("decoupled_weight_decay", rule.name == "AdamW"))
    o = {**o, "decoupled_weight_decay": decoupled}
    name = rule.name.removesuffix("W")
    own = replace(rule, update=STOCK.get(name))
    if name in ("Adagrad", "RMSprop"):
        yield _Variant("its eps stands inside the root", own, o)
    if name == "RAdam":
        told = (
            "optax.radam adds eps after the bias correction, torch before: the update differs by "
            "parts in a million where gradients are small; convert.optim.radam is exact"
        )
        yield _Variant(told, own, o, near=o["eps"] <= 1e-8)
        yield _Variant("it follows Adam's rule", rules()["Adam"], o)
    if name == "Adam" and not o["amsgrad"]:
        yield _Variant("its nesterov is True, not False", own, {**o, "nesterov": True})
        yield _Variant("it follows RAdam's rule", rules()["RAdam"], o)
        yield _Variant("", replace(own, options=("eps_root",)), o)
    if name == "RMSprop" and o["momentum"]:
        nesterov = {**o, "nesterov": True, "eps_in_sqrt": False}
        yield _Variant("its nesterov is True, not False", own, nesterov)
    if name == "SGD" and o["momentum"] and not o["dampening"]:
        other = not o["nesterov"]
        yield _Variant(f"its nesterov is {other}, not {not other}", rule, {**o, "nesterov": other})
    if o.get("dampening"):
        told = f"it has no dampening, the checkpoint {o['dampening']:.6g}"
        yield _Variant(told, rule, {**o, "dampening": 0.0})
    told = "it descends, the checkpoint ascends"
    told = told if o.get("maximize") else "it ascends (maximize), the checkpoint descends"
    yield _Variant(told, rule, {**o, "maximize": not o.get("maximize")})
    if o.get("weight_decay") and rule.name in ("Adam", "AdamW", "NAdam", "RAdam"):
        told = "its weight decay is decoupled, not added to the gradient"
        told = "its weight decay is added to the gradient, not decoupled" if decoupled else told
        yield _Variant(told, rule, {**o, "decoupled_weight_decay": not decoupled})


# --- Other hyper-parameters ---

# The likeliest first.
_OTHERS = ("weight_decay", "eps", "eps_root", "lr_decay", "momentum_decay")
_DECAYS = ("momentum", "alpha", "rho", "dampening", "betas.0", "betas.1")
_TITLES = {"betas.0": "b1", "betas.1": "b2", "alpha": "decay (alpha)"}
_FEW = 64  # elements that values are tried on, before they are tried on all


def _numbers(v: _Variant) -> list[str]:
    """The hyper-parameters of a rule that are numbers, and of use under its options."""
    o = v.options
    useless = ["momentum"] * (not o.get("momentum")) + ["dampening"] * bool(o.get("nesterov"))
    keys = [k for k in (*_OTHERS, *_DECAYS) if k.partition(".")[0] in v.rule.options]
    return [k for k in keys if k not in useless]


def _written(decay: bool) -> list[float]:
    """What somebody would write: 0; one digit, then two; of decays their distance from 1."""
    digits = (*range(1, 10), *(n for n in range(11, 100) if n % 10))
    found = [float(f"{n}e-{k}") for n in digits for k in range(7 if decay else 17)]
    return [0.0, *(round(1 - x, 10) for x in found if x < 1)] if decay else [0.0, *found]


def _solve(elements: Elements, v: _Variant, key: str, rate: float | None) -> float | None:
    """The value of one hyper-parameter that explains the update; None if none does."""
    off = np.flatnonzero(against(elements, v.rule, v.options, rate)[1])
    few = elements.only(off[np.linspace(0, off.size - 1, _FEW).astype(int)])
    values = np.array(_written(key in _DECAYS))
    try:
        _, bad = against(few, v.rule, _with(v.options, key, values[:, None]), rate)
    except Exception:  # a plugin's rule may be unable to take a column
        return None
    for value in map(float, values[~bad.any(axis=-1)]):
        if not against(elements, v.rule, _with(v.options, key, value), rate)[1].any():
            return value
    return None


def _get(options: Options, key: str) -> float:
    name, _, index = key.partition(".")
    value = options.get(name, 0.0)
    return float(value[int(index)] if index else value)


def _with(options: Options, key: str, value: Any) -> Options:
    if "." not in key:
        return {**options, key: value}
    first, second = options["betas"]
    return {**options, "betas": (value, second) if key == "betas.0" else (first, value)}
