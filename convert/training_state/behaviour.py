"""Whether a transformation does what torch's optimizer would do with the same state.

optax hides hyper-parameters in closures, so nothing but an update tells them. One is made of tiny
parameters in the same tree, in float64 and with made-up moments, gradients and parameters of many
magnitudes, and held against torch's rule (see `reference_rules`). Equal up to one factor in each
group, that factor is the learning rate. Anything else is refused, with what explains it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convert.training_state.canonical_names import some
from convert.training_state.explanation import explain
from convert.training_state.reference_rules import TOLERANCE, Elements, against
from convert.training_state.rules import Rule
from zoo.containers.errors import UsageError

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
    """What is held against what.

    `update(sample, momentum, later)` gives the transformation's updates by parameter, and how many
    calls it took; `momentum` says by what to scale the momentum buffer of each parameter, empty for
    not at all; `later` is added to the number of updates so far.
    """

    rule: Rule
    shapes: Mapping[str, tuple[int, ...]]
    groups: Sequence[tuple[Sequence[str], Mapping[str, Any]]]  # parameters that have stepped
    steps: Mapping[str, int]
    slots: Sequence[str]
    scales: bool  # whether there is a momentum that may be scaled by the rate
    update: Callable[[Sample, Mapping[str, float], int], tuple[Arrays, int]]
    calls: int = 1  # how many it took
    summed: bool = False  # whether the gradients of all calls count as their sum


@dataclass
class Verdict:
    """`rates` is the transformation's learning rate for each parameter; `scaled` whether its
    momentum is kept times -rate."""

    rates: dict[str, float] = field(default_factory=dict)
    scaled: bool = False
    notices: list[str] = field(default_factory=list)


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
    now = _run(trial, {}, momentum=not trial.scales)
    then = _run(trial, {}, momentum=not trial.scales, later=LATER)  # some terms show only with time
    if not any(np.any(each.u) for each in (*now, *then)):
        told = "its learning rate is 0 at this step: whether it follows torch's rule is not checked"
        verdict.notices.append(told)
        return verdict
    _judge(trial, now, verdict)
    afterwards = Verdict()  # its rates are a schedule's, and do not matter
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


def _run(
    trial: Trial, scale: Mapping[str, float], momentum: bool = True, later: int = 0
) -> list[Elements]:
    """The transformation's updates, group by group."""
    rounds = []
    for i in range(_ROUNDS):
        made = sample(trial, i, momentum)
        updates, trial.calls = trial.update(made, scale, later)
        rounds.append((made, updates))
    times = trial.calls if trial.summed else 1

    def elements(names: Sequence[str]) -> Elements:
        def row(value: Callable[[Sample, Arrays, str], Any]) -> np.ndarray:
            parts = [
                np.broadcast_to(value(made, updates, name), trial.shapes[name]).reshape(-1)
                for made, updates in rounds
                for name in names
            ]
            return np.concatenate(parts)

        def moments(slot: str) -> Callable[[Sample, Arrays, str], Any]:
            return lambda made, updates, name: made.slots[slot][name]

        return Elements(
            row(lambda made, updates, name: np.array(name, object)),
            row(lambda made, updates, name: updates[name]),
            row(lambda made, updates, name: made.gradients[name]) * times,
            row(lambda made, updates, name: made.params[name]),
            row(lambda made, updates, name: trial.steps.get(name, 0) + later + 1),
            {slot: row(moments(slot)) for slot in trial.slots},
        )

    return [elements(names) for names, _ in trial.groups]


def _judge(trial: Trial, groups: Sequence[Elements], verdict: Verdict) -> None:
    """Fill in the rates; UsageError with every group that does not follow its rule."""
    problems: list[str] = []
    for elements, (names, options) in zip(groups, trial.groups, strict=True):
        if not np.any(elements.u):  # the rate is 0 at this step
            verdict.rates |= dict.fromkeys(names, 0.0)
            continue
        rate, problem = _of_group(trial.rule, elements, options, verdict)
        if problem:
            culprits, why = problem
            where = "every parameter" if len(culprits) == len(names) else some(culprits)
            problems.append(f"{where}: {why}")
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


def _of_group(
    rule: Rule, elements: Elements, options: Mapping[str, Any], verdict: Verdict
) -> tuple[float, tuple[list[str], str] | None]:
    """The learning rate; and where the rule is not followed, which parameters' and why."""
    rate, bad = against(elements, rule, options)
    if bad.any() and rule.name == "Adam" and "decoupled_weight_decay" not in options:
        # Before torch 2.8 nothing told AdamW from Adam: it is the one that the target is.
        other = against(elements, rule, {**options, "decoupled_weight_decay": True})
        rate, bad = (rate, bad) if other[1].any() else other
    if not bad.any():
        negative = list(dict.fromkeys(elements.names)), "its learning rate is negative"
        return rate, negative if rate < 0 else None
    culprits = list(dict.fromkeys(elements.names[bad]))
    found = explain(rule, elements, options, bad, rate)
    if not found.near:
        return rate, (culprits, found.text)
    verdict.notices.append(found.text)
    return found.rate, None


def tell_rates(trial: Trial, verdict: Verdict) -> None:
    """Notices where the transformation's learning rate is not the checkpoint's."""
    for names, options in trial.groups:
        given = options.get("lr")
        rate = next((verdict.rates[n] for n in names if n in verdict.rates), None)
        if rate is not None and given is not None and rate != given:
            verdict.notices.append(
                f"the learning rate is {rate:.6g} at this step, the checkpoint's was {given:.6g}"
            )
