"""Canonical state into the tree of an optax transformation, wherever in it the states stand."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from convert.training_state import behaviour
from convert.training_state.canonical_names import flax_shapes, some
from convert.training_state.optax_leaves import Content, content_of, fill_leaves, flatten, shapes_of
from convert.training_state.optax_tree import StateTree, classes_of, read_tree
from convert.training_state.optax_trial import make_trial
from convert.training_state.rules import rules
from convert.training_state.state import OptimizerState
from zoo.checkpoint.problems import dims
from zoo.containers.errors import UsageError
from zoo.layout import Layout
from zoo.loading import LoadNotice

_WHY = {  # what a transformation without this slot lacks
    "mu_product": "NAdam's momentum has a schedule, which optax.nadam does not know",
    "max_exp_avg_sq": "AMSGrad keeps the maximum of the second moment",
    "grad_avg": "the RMSprop that was trained is centered",
    "momentum_buffer": "the optimizer that was trained has momentum",
}


def fill_optax(
    state: OptimizerState,
    tx: Any,
    params: Any,
    layout: Layout,
    *,
    tree: Any = None,
    learning_rate: float | None = None,
    check: bool = True,
    step: int | None = None,
) -> Any:
    """The tree of `tx.init(params)`, filled.

    `params` is `nnx.state(model, nnx.Param)`, or a part of it; `layout` says what its names are in
    torch. `tree` is filled in place of a fresh one. `learning_rate` is the one that scales a
    momentum which the transformation keeps behind its rate, where nothing else tells it. `check`
    tries the transformation on made-up gradients. `step` is the number of updates so far, where the
    state does not count them (SGD, Lion). Everything that a user should know is a LoadNotice.
    Raises UsageError, with what was found and what to give, where the state does not fit.
    """
    tree = tx.init(params) if tree is None else tree
    names, leaves, structure = flatten(tree)
    notices = list(state.notices)
    content = content_of(state, layout, step, notices)
    shapes = {n: s for n, s in shapes_of(params).items() if n in flax_shapes(layout)}
    found = read_tree(names, shapes, classes_of(tree))
    check_tree(found)
    _check_params(content, found, shapes, notices)
    _check_slots(content, found)
    trial = make_trial(content, found, tx, params, names, notices) if check else None
    verdict = _check(trial, found, leaves, params) if trial else behaviour.Verdict()
    if trial:
        behaviour.tell_rates(trial, verdict)
    notices += verdict.notices
    scale = _scale(content, found, verdict, trial is not None, learning_rate)
    filled = fill_leaves(found, leaves, content, scale, notices)
    import jax

    for notice in dict.fromkeys(notices):
        warnings.warn(notice, LoadNotice, stacklevel=3)
    return jax.tree.unflatten(structure, filled)


def _check(
    trial: behaviour.Trial, tree: StateTree, leaves: Sequence[Any], params: Any
) -> behaviour.Verdict:
    """Whether it follows torch's rule; a refusal names the states that no rule of torch's has."""
    try:
        return behaviour.check(trial)
    except UsageError as e:
        more = [
            f"at {place}: {cls}, which no torch optimizer has"
            for place, cls in tree.unknown.items()
        ]
        own = {str(p.dtype) for p in flatten(params)[1]}
        narrow = {str(x.dtype) for x in leaves} & {"bfloat16", "float16"} - own
        more += [f"it rounds what it keeps to {', '.join(sorted(narrow))} (mu_dtype)"] * bool(
            narrow
        )
        raise UsageError(e.problem, e.advice, [*e.details, *more]) from None


def check_tree(tree: StateTree) -> None:
    """UsageError for states that cannot be filled, and for two optimizers of one parameter."""
    if tree.refused:
        raise UsageError(
            "the transformation follows a rule that torch does not have",
            "make it with convert.optim, whose rules are torch's",
            [f"at {place or 'the root'}: {why}" for place, why in tree.refused.items()],
        )
    if not tree.holdings and tree.unknown:
        raise UsageError(
            f"the transformation keeps {', '.join(tree.unknown.values())}, which no torch "
            "optimizer that is known does",
            f"use one of {', '.join(r.transformation for r in rules().values())}",
        )
    for h in tree.holdings:
        for param in h.params:
            slots = [s for other in tree.holdings_of(param) for s in other.fields.values()]
            fits = any(
                set(r.needs) <= set(slots) <= set(r.slots) for r in rules().values()
            ) and len(set(slots)) == len(slots)
            if not fits:
                places = [o.place or "the root" for o in tree.holdings_of(param)]
                raise UsageError(
                    f"{len(places)} states in the chain keep moments of {param}: "
                    f"{', '.join(sorted(set(slots)))} (at {', '.join(places)})",
                    "torch has one optimizer for a parameter: give each its own part of an "
                    "optax.multi_transform, or keep one",
                )


def _check_params(
    content: Content, tree: StateTree, shapes: Mapping[str, tuple[int, ...]], notices: list[str]
) -> None:
    """UsageError where the tree trains other parameters than the state is of."""
    moments = [s for s in content.slots if s not in content.rule.scalars]
    held = list(dict.fromkeys(p for h in tree.holdings for p in h.params))
    missing = [p for p in held if p not in content.params]
    surplus = [p for s in moments for p in content.slots[s] if p not in held]
    surplus = list(dict.fromkeys(surplus)) if tree.holdings or not moments else []
    if missing or surplus:
        raise UsageError(
            f"the state is of {len(content.params)} parameters, the transformation keeps moments "
            f"of {len(held)}, and {len(missing) + len(surplus)} are not in both",
            "train the same parameters: optax.multi_transform with optax.set_to_zero() leaves the "
            "others out, nnx.Optimizer(wrt=...) too",
            [f"only in the transformation: {some(missing)}"] * bool(missing)
            + [f"only in the state: {some(surplus)}"] * bool(surplus),
        )
    wrong = [
        f"{p}: moments of {dims(a.shape)}, the parameter is {dims(shapes[p])}"
        for s in moments
        for p, a in content.slots[s].items()
        if p in shapes and a.shape != shapes[p]
    ]
    if wrong:
        raise UsageError("the state has other shapes", "give the model that it is of", wrong[:8])
    fresh = [p for p in held if not any(p in content.slots[s] for s in moments)]
    if fresh and len(fresh) < len(held):
        notices.append(f"never updated so far, their moments are zero: {some(fresh)}")
    elif fresh:
        notices.append("the optimizer in the checkpoint has made no update: the state is fresh")


def _check_slots(content: Content, tree: StateTree) -> None:
    """UsageError where the tree keeps other things than the state."""
    rule = content.rule
    if not tree.holdings and any(content.slots.values()):
        raise UsageError(
            f"the transformation keeps no moments, the state has {', '.join(content.slots)}",
            f"make it as {rule.transformation}, with the hyper-parameters that were trained",
        )
    for param in dict.fromkeys(p for h in tree.holdings for p in h.params):
        kept = tree.slots_of(param)
        there = {s for s, values in content.slots.items() if param in values}
        if not there and rule.knows(content.options[param]):  # not yet stepped
            there = rule.kept(content.options[param])
        elif not there:
            continue
        if there == kept:
            continue
        why = [_WHY[s] for s in sorted(there - kept) if s in _WHY]
        more = sorted(kept - there)
        raise UsageError(
            f"the state is of {rule.name} and has {', '.join(sorted(there)) or 'nothing'} of "
            f"{param}, the transformation keeps {', '.join(sorted(kept))}",
            f"make it as {rule.transformation}, with the hyper-parameters that were trained",
            why + ([f"it keeps {', '.join(more)}, which was not trained"] if more else []),
        )


def _scale(
    content: Content,
    tree: StateTree,
    verdict: behaviour.Verdict,
    tried: bool,
    learning_rate: float | None,
) -> dict[str, float]:
    """By which rate each parameter's momentum is scaled; empty where none is."""
    traces = [h for h in tree.holdings if h.scalable]
    if not traces or not content.slots.get("momentum_buffer"):
        return {}
    known = tried and verdict.rates
    if not (verdict.scaled if known else tree.behind_the_rate()):
        return {}
    rates: dict[str, float] = {}
    for param in (p for h in traces for p in h.params):
        told = (verdict.rates.get(param), learning_rate, content.options[param].get("lr"))
        rate = next((r for r in told if r is not None), None)
        if rate is None or rate == 0:
            raise UsageError(
                "the transformation keeps its momentum times the learning rate, which nothing tells"
                if rate is None
                else "the learning rate that scales the momentum is 0",
                "give learning_rate=..., that of the transformation at this step, or use "
                f"{content.rule.transformation}",
            )
        rates[param] = float(rate)
    return rates
