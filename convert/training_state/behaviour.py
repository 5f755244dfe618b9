"""Whether a transformation does what torch's optimizer would do with the same state.

optax hides hyper-parameters in closures, so nothing but an update tells them. One is made of tiny
parameters in the same tree, in float64 and with made-up moments, gradients and parameters of many
magnitudes, and held against torch's rule in NumPy. Equal up to one factor in each group, that
factor is the learning rate. Else the options are varied until one explains the difference.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convert.training_state.canonical_names import some
from convert.training_state.rules import Rule, rules
from zoo.containers.errors import UsageError

TOLERANCE = 8 * 2.0**-23  # hyper-parameters may be held as float32 arrays
_ROUNDS = 3  # sets of made-up values
LATER = 1000
MOST_STEPS = 256  # of accumulation, before MultiSteps lets an update through

Arrays = dict[str, np.ndarray]


@dataclass
class Sample:
    """Made-up values by parameter, of tiny shapes."""

    gradients: Arrays
    params: Arrays
    slots: dict[str, Arrays]


@dataclass
class Trial:
    """What is being held against what. `update(sample, momentum, later)` gives the
    transformation's updates by parameter, and how many calls it took; `momentum` says by what to
    scale the momentum buffer of each parameter, empty for not at all; `later` is added to the
    number of updates so far."""

    rule: Rule
    shapes: Mapping[str, tuple[int, ...]]
    groups: Sequence[tuple[Sequence[str], Mapping[str, Any]]]  # parameters that have stepped
    steps: Mapping[str, int]
    slots: Sequence[str]
    scales: bool  # whether there is a momentum that may be scaled by the rate
    update: Callable[[Sample, Mapping[str, float], int], tuple[Arrays, int]]
    calls: int = 1  # how many it took
    later: int = 0  # updates after the present one: some terms only show with time
    summed: bool = False  # whether the gradients of all calls count as their sum


@dataclass
class Verdict:
    """`rates` is the transformation's learning rate for each parameter; `scaled` whether its
    momentum is kept times -rate."""

    rates: dict[str, float] = field(default_factory=dict)
    scaled: bool = False
    notices: list[str] = field(default_factory=list)


@dataclass
class _Flat:
    """All elements of one group, of all rounds, in a row."""

    names: np.ndarray
    u: np.ndarray
    g: np.ndarray
    p: np.ndarray
    t: np.ndarray
    slots: dict[str, np.ndarray]

    def only(self, names: set[str]) -> _Flat:
        """The elements of some parameters."""
        pick = np.array([n in names for n in self.names])
        slots = {s: v[pick] for s, v in self.slots.items()}
        u, g, p, t = (x[pick] for x in (self.u, self.g, self.p, self.t))
        return _Flat(self.names[pick], u, g, p, t, slots)


def sample(trial: Trial, round_: int, momentum: bool = True) -> Sample:
    """Values whose every term matters somewhere: gradients too small to be clipped."""
    total = sum(int(np.prod(s)) for s in trial.shapes.values())
    made = Sample({}, {}, {slot: {} for slot in trial.slots})
    for name, shape in trial.shapes.items():
        r = np.random.RandomState(zlib.crc32(f"{round_} {name}".encode()))
        signs = r.choice([-1.0, 1.0], shape)
        made.gradients[name] = 3e-4 / total**0.5 * r.standard_normal(shape)
        made.params[name] = np.asarray(signs * 10 ** r.uniform(-4, 1, shape))
        root = np.asarray(10 ** r.uniform(-9, -2, shape))
        values = {
            "exp_avg": root * r.standard_normal(shape),
            "grad_avg": root * r.uniform(-0.9, 0.9, shape),
            "max_exp_avg_sq": root**2 * np.exp(r.standard_normal(shape)),
            "acc_delta": np.asarray(10 ** r.uniform(-12, -2, shape)),
            "momentum_buffer": signs * 10 ** r.uniform(-6, 2, shape) * float(momentum),
            "mu_product": np.asarray(0.25),
        }
        for slot in trial.slots:
            made.slots[slot][name] = np.asarray(values.get(slot, root**2))
    return made


def check(trial: Trial) -> Verdict:
    """UsageError, saying what explains it where that is found, unless the rule is followed."""
    try:
        return _check(trial)
    except UsageError:
        if trial.calls == 1:
            raise
        try:  # gradients that are gathered may be added up instead of averaged
            trial.summed = True
            return _check(trial)
        except UsageError:
            pass
        raise


def _check(trial: Trial) -> Verdict:
    verdict = Verdict()
    trial.later = 0
    now = _run(trial, {}, momentum=not trial.scales)
    trial.later = LATER
    then = _run(trial, {}, momentum=not trial.scales)
    trial.later = 0
    if not any(np.any(flat.u) for flat in (*now, *then)):
        told = "its learning rate is 0 at this step: whether it follows torch's rule is not checked"
        verdict.notices.append(told)
        return verdict
    _judge(trial, now, verdict)
    afterwards = Verdict()  # of which the rates are a schedule's, and no matter
    _judge(trial, then, afterwards)
    verdict.notices += afterwards.notices
    if not trial.scales:
        return verdict
    try:
        _judge(trial, _run(trial, {}), verdict)
    except UsageError as e:
        try:
            _judge(trial, _run(trial, verdict.rates), verdict)
        except UsageError:
            raise e from None
        verdict.scaled = True
    return verdict


def _run(trial: Trial, scale: Mapping[str, float], momentum: bool = True) -> list[_Flat]:
    """The transformation's updates, group by group."""
    rounds = [sample(trial, i, momentum) for i in range(_ROUNDS)]
    updates = []
    for each in rounds:
        found, trial.calls = trial.update(each, scale, trial.later)
        updates.append(found)
    times = trial.calls if trial.summed else 1
    flats = []
    for names, _ in trial.groups:
        parts: dict[str, list[np.ndarray]] = {}
        for each, u in zip(rounds, updates, strict=True):
            for name in names:
                size = each.params[name].size
                parts.setdefault("names", []).append(np.full(size, name, object))
                parts.setdefault("t", []).append(
                    np.full(size, trial.steps.get(name, 0) + trial.later + 1.0)
                )
                for key, value in (
                    ("u", u[name]),
                    ("g", times * each.gradients[name]),
                    ("p", each.params[name]),
                    *((s, each.slots[s][name]) for s in trial.slots),
                ):
                    full = np.broadcast_to(value, each.params[name].shape)
                    parts.setdefault(key, []).append(np.asarray(full).reshape(-1))
        joined = {k: np.concatenate(v) for k, v in parts.items()}
        slots = {s: joined[s] for s in trial.slots}
        flats.append(
            _Flat(joined["names"], joined["u"], joined["g"], joined["p"], joined["t"], slots)
        )
    return flats


def _judge(trial: Trial, flats: Sequence[_Flat], verdict: Verdict) -> None:
    """Fill in the rates; UsageError with every group that does not follow its rule."""
    problems: list[str] = []
    for flat, (names, options) in zip(flats, trial.groups, strict=True):
        if not np.any(flat.u):  # the rate is 0 at this step
            verdict.rates |= dict.fromkeys(names, 0.0)
            continue
        rate, bad = _compare(flat, trial.rule, options)
        if bad.any() and trial.rule.name == "Adam" and "decoupled_weight_decay" not in options:
            # Before torch 2.8 nothing told AdamW from Adam: it is the one that the target is.
            other = _compare(flat, trial.rule, {**options, "decoupled_weight_decay": True})
            rate, bad = (rate, bad) if other[1].any() else other
        if bad.any():
            found = _explain(trial.rule, flat, options, bad, rate)
            if found is not None and found.near:
                verdict.notices.append(found.text)
                rate = found.rate
            else:
                culprits = list(dict.fromkeys(flat.names[bad]))
                where = "every parameter" if len(culprits) == len(names) else some(culprits)
                problems.append(f"{where}: {found.text if found else _unexplained(trial.rule)}")
                continue
        elif rate < 0:
            problems.append(f"{some(list(names))}: its learning rate is negative")
            continue
        given = options.get("lr")
        if isinstance(given, int | float) and abs(rate - given) <= TOLERANCE * abs(given):
            rate = float(given)
        verdict.rates |= dict.fromkeys(names, rate)
    if problems:
        raise UsageError(
            f"this transformation does not follow the {trial.rule.name} that was trained",
            f"make it with the same hyper-parameters, as {trial.rule.transformation}; "
            "check=False fills it all the same",
            problems,
        )


def tell_rates(trial: Trial, verdict: Verdict) -> None:
    """Notices where the transformation's learning rate is not the checkpoint's."""
    for names, options in trial.groups:
        given = options.get("lr")
        rate = next((verdict.rates[n] for n in names if n in verdict.rates), None)
        if rate is not None and given is not None and rate != given:
            verdict.notices.append(
                f"the learning rate is {rate:.6g} at this step, the checkpoint's was {given:.6g}"
            )


def _direction(rule: Rule, flat: _Flat, options: Mapping[str, Any]) -> np.ndarray:
    assert rule.update is not None
    with np.errstate(all="ignore"):
        found, _ = rule.update(options, dict(flat.slots), flat.t, flat.g, flat.p)
    return np.asarray(np.broadcast_to(found, flat.u.shape), np.float64)


def _compare(flat: _Flat, rule: Rule, options: Mapping[str, Any]) -> tuple[float, np.ndarray]:
    """The factor between update and direction, and which elements have another."""
    d = _direction(rule, flat, options)
    with np.errstate(all="ignore"):
        ratio = -flat.u / d
        there = np.isfinite(ratio) & (d != 0)
        rate = float(np.median(ratio[there])) if there.any() else 0.0
        off = np.abs(flat.u + rate * d)
        bad = ~(off <= TOLERANCE * np.maximum(np.abs(flat.u), np.abs(rate * d)))
    return rate, bad


@dataclass
class _Found:
    text: str
    rate: float
    near: bool = False  # close enough to go ahead


def _explain(
    rule: Rule, flat: _Flat, options: Mapping[str, Any], bad: np.ndarray, rate: float
) -> _Found | None:
    """The first change of the options under which the update is the rule's."""
    part = flat
    if bad.sum() * 2 < bad.size:  # most parameters are right: only the others need a reason
        part = flat.only(set(flat.names[bad]))
    fixed = None if part is flat else rate
    for text, other, changed in _variants(rule, options):
        if _fits(part, other, changed, fixed):
            near = rule.name == "RAdam" and "eps_in_sqrt" in changed and options["eps"] <= 1e-8
            return _Found(text, _compare(part, other, changed)[0], near)
    for text, other, changed in [("", rule, dict(options)), *_variants(rule, options)]:
        for key in _numbers(other, changed):
            value = _solve(part, other, changed, key, fixed)
            if value is not None:
                title = f"its {_title(key)} is {value:.6g}, not {_get(options, key):.6g}"
                return _Found(" and ".join(filter(None, (title, text))), rate)
    return None


def _gaps(flat: _Flat, rule: Rule, options: Mapping[str, Any], fixed: float | None) -> np.ndarray:
    """Each element's relative gap, with a rate that is fixed or the best."""
    d = _direction(rule, flat, options)
    with np.errstate(all="ignore"):
        ratio = -flat.u / d
        there = np.isfinite(ratio) & (d != 0)
        if fixed is None:
            fixed = float(np.median(ratio[there])) if there.any() else 0.0
        gap = np.abs(flat.u + fixed * d) / np.maximum(np.abs(flat.u), np.abs(fixed * d))
    return np.where((flat.u == 0) & (d == 0), 0.0, np.nan_to_num(gap, nan=1.0, posinf=1.0))


def _fits(flat: _Flat, rule: Rule, options: Mapping[str, Any], fixed: float | None) -> bool:
    return bool((_gaps(flat, rule, options, fixed) <= TOLERANCE).all())


def _variants(rule: Rule, o: Mapping[str, Any]) -> Iterator[tuple[str, Rule, dict[str, Any]]]:
    """The other rules that stock transformations follow."""
    o = dict(o)
    if rule.name in ("Adagrad", "RMSprop"):
        yield "its eps stands inside the root", rule, o | {"eps_in_sqrt": True}
    if rule.name == "RAdam":
        told = (
            "optax.radam adds eps after the bias correction, torch before: the update differs by "
            "parts in a million where gradients are small; convert.optim.radam is exact"
        )
        yield told, rule, o | {"eps_in_sqrt": True}
    if rule.name in ("SGD", "Adam", "AdamW", "RMSprop"):
        other = not o.get("nesterov", False)
        yield f"its nesterov is {other}, not {not other}", rule, o | {"nesterov": other}
    other = not o.get("maximize", False)
    told = "it ascends (maximize), the checkpoint descends"
    yield told if other else "it descends, the checkpoint ascends", rule, o | {"maximize": other}
    if o.get("dampening"):
        told = f"it has no dampening, the checkpoint {o['dampening']:.6g}"
        yield told, rule, o | {"dampening": 0.0}
    if o.get("weight_decay") and "betas" in o and rule.name != "Lion":
        decoupled = bool(o.get("decoupled_weight_decay", rule.name == "AdamW"))
        told = (
            "its weight decay is added to the gradient, not decoupled"
            if decoupled
            else "its weight decay is decoupled, not added to the gradient"
        )
        yield told, rule, o | {"decoupled_weight_decay": not decoupled}
    if rule.name in ("Adam", "AdamW", "RAdam"):
        for name in ("Adam", "RAdam"):
            if name not in (rule.name, rule.name.removesuffix("W")):
                yield f"it follows {name}'s rule", rules()[name], o


def _numbers(rule: Rule, options: Mapping[str, Any]) -> Iterator[str]:
    """The hyper-parameters that are numbers, the likeliest first."""
    for key in ("weight_decay", "eps", "momentum", "alpha", "rho", "dampening", "lr_decay"):
        if key in rule.options and not (key == "momentum" and not options[key]):
            yield key
    if "betas" in rule.options:
        yield from ("betas.0", "betas.1")
    if "momentum_decay" in rule.options:
        yield "momentum_decay"
    if rule.name in ("Adam", "AdamW"):
        yield "eps_root"


def _title(key: str) -> str:
    return {"betas.0": "b1", "betas.1": "b2", "alpha": "decay (alpha)"}.get(key, key)


def _get(options: Mapping[str, Any], key: str) -> float:
    name, _, index = key.partition(".")
    value = options.get(name, 0.0)
    return float(value[int(index)] if index else value)


def _with(options: Mapping[str, Any], key: str, value: float) -> dict[str, Any]:
    name, _, index = key.partition(".")
    value = np.float64(value)  # which divides by zero without raising
    if not index:
        return {**options, name: value}
    both = list(options[name])
    both[int(index)] = value
    return {**options, name: tuple(both)}


def _solve(
    flat: _Flat, rule: Rule, options: Mapping[str, Any], key: str, fixed: float | None
) -> float | None:
    """The value of one hyper-parameter that explains the update; None if none does."""
    decays = key in ("betas.0", "betas.1", "momentum", "alpha", "rho", "dampening")

    def value(x: float) -> float:
        return 1 - 10**x if decays else 10**x

    def error(x: float) -> float:
        # Their mean: the largest gap has many minima.
        return float(np.minimum(_gaps(flat, rule, _with(options, key, value(x)), fixed), 1).mean())

    for simple in (0.0, 0.9, 0.99, 0.999) if decays else (0.0,):
        if _fits(flat, rule, _with(options, key, simple), fixed):
            return simple
    grid = np.linspace(-5, 0, 41) if decays else np.linspace(-14, 1, 61)
    errors = [error(x) for x in grid]
    best = int(np.argmin(errors))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    golden = (5**0.5 - 1) / 2
    for _ in range(60):
        a, b = high - golden * (high - low), low + golden * (high - low)
        if error(a) < error(b):
            high = b
        else:
            low = a
    # What somebody wrote, if that is it; the search itself only comes near.
    found = value((low + high) / 2)
    for digits in (2, 4, 6, 17):
        written = float(f"{found:.{digits}g}")
        if _fits(flat, rule, _with(options, key, written), fixed):
            return written
    return None


def _unexplained(rule: Rule) -> str:
    return f"its update is not {rule.name}'s, and no one hyper-parameter explains it"
