"""The state of an optax optimizer, live or in a checkpoint, to canonical form."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from convert.training_state.canonical_names import (
    canonical_of,
    flax_shapes,
    layout_of,
    some,
    to_canonical,
)
from convert.training_state.lazy import Lazy, Read, loaded
from convert.training_state.optax_fill import check_tree
from convert.training_state.optax_leaves import flatten
from convert.training_state.optax_tree import (
    COUNTS,
    Holding,
    StateTree,
    ancestors,
    classes_of,
    read_tree,
)
from convert.training_state.rules import Rule, rules
from convert.training_state.state import UNCOUNTED, Group, OptimizerState
from zoo.containers.base import TensorInfo
from zoo.containers.dtypes import code_of
from zoo.containers.errors import UsageError
from zoo.layout import Layout, Tree

Flat = Mapping[str, Any]  # dotted names -> arrays, or what reads them


def from_optax(
    opt_state: Any,
    model: Any,
    *,
    learning_rate: float | None = None,
    step: int | None = None,
    name: str = "",
) -> OptimizerState:
    """The canonical state of a live tree of optax states, or of an nnx.Optimizer.

    `model` is the NNX module whose parameters it is of, or their Layout. `learning_rate` undoes the
    scaling of a momentum that is kept behind the rate, where no hyper-parameter was injected.
    `step` is the number of updates where the tree does not count them. Several transformations of
    one kind over disjoint parameters become one state with a group for each. Raises UsageError
    where the tree holds none or several optimizers, or one that torch does not have.
    """
    if hasattr(opt_state, "opt_state") and hasattr(opt_state, "tx"):  # an nnx.Optimizer
        step = int(np.asarray(opt_state.step.get_value())) if step is None else step
        opt_state = opt_state.opt_state
    layout = model if isinstance(model, Layout) else layout_of(model, module_shapes(model))
    names, leaves, _ = flatten(opt_state)
    flat = dict(zip(names, leaves, strict=True))
    tree = read_tree(names, flax_shapes(layout), classes_of(opt_state))
    found = _read(flat, tree, layout, "nnx", learning_rate, step, name)
    if len(found) > 1:
        raise UsageError(
            "the tree holds several kinds of optimizers: "
            + "; ".join(f"{s.rule} of {some(s.params)}" for s in found),
            "torch has one kind in an optimizer: train the parts by one kind, or convert the "
            "state of each by itself (opt_state.inner_states[label])",
        )
    (state,) = found
    state.slots = {slot: loaded(values) for slot, values in state.slots.items()}
    return state


def from_flat(
    flat: Mapping[str, np.ndarray | Read],
    layout: Layout,
    *,
    learning_rate: float | None = None,
    step: int | None = None,
    name: str = "",
) -> list[OptimizerState]:
    """The canonical states in a checkpoint of dotted names, such as `opt_state.0.mu.fc1.kernel`:
    one for each kind of optimizer.

    Names that belong to no optimizer are passed over. The tree may be NNX's or Linen's. What the
    arguments do, and what is raised, is as in `from_optax`. `flat` has arrays, or what reads them;
    of a `Lazy` mapping moments stay unread until they are looked at.
    """
    best: tuple[int, StateTree, Tree] | None = None
    trees: tuple[Tree, ...] = ("nnx", "linen", "linen-compact")
    for tree_name in trees:
        for params in _spellings(layout, tree_name):
            tree = read_tree(flat, params)
            count = sum(len(h.params) for h in tree.holdings) + len(tree.refused)
            if best is None or count > best[0]:
                best = (count, _renamed(tree, params), tree_name)
    assert best is not None
    found = _read(flat, best[1], layout, best[2], learning_rate, step, name)
    for state in found:
        if not isinstance(flat, Lazy):
            state.slots = {slot: loaded(values) for slot, values in state.slots.items()}
    return found


def module_shapes(module: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of an NNX module's weights."""
    from flax import nnx

    state = nnx.to_flat_state(nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat)))
    return {".".join(map(str, path)): tuple(v.shape) for path, v in state}


def _spellings(layout: Layout, tree: Tree) -> Iterable[dict[str, str]]:
    """What a checkpoint may call the parameters -> the tree's name; Linen with or without the
    collection before it."""
    names = list(flax_shapes(layout, tree))
    yield {n: n for n in names}
    if tree != "nnx":
        yield {n.partition(".")[2]: n for n in names}


def _renamed(tree: StateTree, params: Mapping[str, str]) -> StateTree:
    for h in tree.holdings:
        h.params = [params[p] for p in h.params]
    tree.spots = [
        s if s.param is None else type(s)(s.name, s.place, s.field, params[s.param])
        for s in tree.spots
    ]
    return tree


def _read(
    flat: Flat,
    tree: StateTree,
    layout: Layout,
    tree_name: Tree,
    learning_rate: float | None,
    step: int | None,
    name: str,
) -> list[OptimizerState]:
    """One state for each rule that is found."""
    check_tree(tree)
    canonical = canonical_of(layout, tree_name)
    parts: dict[tuple[str, ...], list[str]] = {}
    for param in canonical:
        if places := tuple(h.place for h in tree.holdings_of(param)):
            parts.setdefault(places, []).append(param)
    by_rule: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for places, params in parts.items():
        by_rule.setdefault(_rule(tree, params[0]).name, {})[places] = params
    if not by_rule:
        return [_without_moments(flat, tree, canonical, name)]
    states = []
    for rule, some_parts in by_rule.items():
        label = name if len(by_rule) == 1 else _label(next(iter(some_parts))[0]) or name
        state = OptimizerState(rule, [], {}, {}, label)
        values: dict[str, Lazy] = {}
        scalars: dict[str, dict[str, np.ndarray]] = {}
        for places, params in some_parts.items():
            names = tuple(dict.fromkeys(n for p in params for n in canonical[p]))
            _read_part(
                flat, tree, places, params, names, state, values, scalars, learning_rate, step
            )
        if rules()[rule].counts and not state.steps:
            state.notices.append(UNCOUNTED)
        state.slots = {
            s: scalars[s] if s in scalars else to_canonical(values[s], layout, tree_name)
            for s in rules()[rule].slots
            if s in values or s in scalars
        }
        _tell_waiting(flat, tree, state)
        states.append(state)
    return states


def _read_part(
    flat: Flat,
    tree: StateTree,
    places: Sequence[str],
    params: Sequence[str],
    names: tuple[str, ...],
    state: OptimizerState,
    values: dict[str, Lazy],
    scalars: dict[str, dict[str, np.ndarray]],
    learning_rate: float | None,
    step: int | None,
) -> None:
    """Add a group: the parameters whose moments are in the same places."""
    rule = rules()[state.rule]
    holdings = [h for h in tree.holdings if h.place in places]
    options = _options(flat, tree, places[0], rule)
    rate = learning_rate if learning_rate is not None else options.get("lr")
    state.groups.append(Group(names, options))
    _slots(flat, tree, holdings, params, _divisor(tree, holdings, rate), values)
    for slot, value in _numbers(flat, tree, holdings, rule).items():
        scalars.setdefault(slot, {}).update(dict.fromkeys(names, value))
    steps = _steps(flat, tree, holdings, step)
    if steps is not None and rule.counts:
        state.steps |= dict.fromkeys(names, steps)


def _rule(tree: StateTree, param: str) -> Rule:
    """The first rule that keeps what is kept of a parameter: Adam stands for AdamW and RAdam,
    whose states are alike."""
    slots = tree.slots_of(param)
    return next(r for r in rules().values() if set(r.needs) <= slots <= set(r.slots))


def _label(place: str) -> str:
    """The part of a multi_transform in which a place lies."""
    parts = place.split(".")
    return parts[parts.index("inner_states") + 1] if "inner_states" in parts[:-1] else ""


def _without_moments(
    flat: Flat, tree: StateTree, canonical: Mapping[str, tuple[str, ...]], name: str
) -> OptimizerState:
    """Plain SGD: nothing but counts and hyper-parameters."""
    if tree.unknown:
        raise UsageError(
            f"no optimizer that is known: it keeps {', '.join(tree.unknown.values())}",
            f"known are {', '.join(rules())}",
        )
    names = tuple(dict.fromkeys(n for group in canonical.values() for n in group))
    told = "the optimizer keeps no moments: taken for SGD without momentum"
    group = Group(names, _options(flat, tree, "", rules()["SGD"]))
    return OptimizerState("SGD", [group], {}, {}, name, [told])


def _slots(
    flat: Flat,
    tree: StateTree,
    holdings: Sequence[Holding],
    params: Sequence[str],
    divide: float | None,
    into: dict[str, Lazy],
) -> None:
    wanted = set(params)
    fields = {h.place: h for h in holdings}
    for spot in tree.spots:
        held = fields.get(spot.place)
        if held is None or spot.param not in wanted or spot.field not in held.fields:
            continue
        assert spot.param is not None
        slot = held.fields[spot.field]
        read = functools.partial(_value, flat, spot.name)
        if slot == "momentum_buffer" and divide is not None:
            read = functools.partial(_divided, read, divide)
        value = flat[spot.name] if not isinstance(flat, Lazy) else None
        array = value() if callable(value) else value
        info = flat.infos[spot.name] if isinstance(flat, Lazy) else _info(array)
        into.setdefault(slot, Lazy()).add(spot.param, info, read)


def _info(array: Any) -> TensorInfo:
    return TensorInfo(code_of(np.dtype(array.dtype)), tuple(array.shape))


def _divided(read: Read, divisor: float) -> np.ndarray:
    """Unscaled with one rounding."""
    array = read()
    return (array.astype(np.float64) / divisor).astype(array.dtype)


def _value(flat: Flat, name: str) -> np.ndarray:
    value = flat[name]
    return np.asarray(value() if callable(value) else value)


def _numbers(
    flat: Flat, tree: StateTree, holdings: Sequence[Holding], rule: Rule
) -> dict[str, np.ndarray]:
    """Slots that one state keeps as one number for all its parameters."""
    places = {h.place for h in holdings}
    return {
        s.field: _value(flat, s.name)
        for s in tree.spots
        if s.place in places and s.param is None and s.field in rule.scalars
    }


def _divisor(tree: StateTree, holdings: Sequence[Holding], rate: float | None) -> float | None:
    """What a momentum was multiplied by; None where it was not."""
    if not any(h.scalable for h in holdings) or not tree.behind_the_rate():
        return None
    if rate is None or rate == 0:
        raise UsageError(
            "its momentum is kept times the learning rate, as optax.rmsprop keeps it, and the "
            "rate is not in the tree"
            if rate is None
            else "the rate that scales its momentum is 0",
            "give learning_rate=... (--learning-rate), that of the last update; inject_hyperparams "
            "would keep it, convert.optim.rmsprop does not scale",
        )
    return -float(rate)


def _options(flat: Flat, tree: StateTree, place: str, rule: Rule) -> dict[str, Any]:
    """The hyper-parameters that were injected nearest around a place, by torch's names."""
    for around in ancestors(place):
        injected = {s.field: s.name for s in tree.spots if s.hyper and s.place == around}
        if not injected:
            continue
        found: dict[str, Any] = {}
        betas: dict[int, float] = {}
        for key, name in injected.items():
            option = "lr" if key == "learning_rate" else rule.hyperparams.get(key)
            if option is None:
                continue
            base, _, index = option.partition(".")
            if index:
                betas[int(index)] = _decimal(_value(flat, name))
            else:
                found[base] = _decimal(_value(flat, name))
        if len(betas) == 2:
            found["betas"] = (betas[0], betas[1])
        return found
    return {}


def _decimal(value: Any) -> float:
    """The number that somebody wrote: 0.1, not the float32 nearest to it."""
    array = np.asarray(value)
    return float(str(array.item() if array.dtype == np.float64 else array.astype(np.float32)))


def _steps(
    flat: Flat, tree: StateTree, holdings: Sequence[Holding], step: int | None
) -> int | None:
    """The count beside the moments, else the one that is nearest around them, else `step`."""
    counts = {s.place: s.name for s in tree.spots if s.field in COUNTS and s.param is None}
    for h in holdings:
        if h.place in counts:
            return int(_value(flat, counts[h.place]))
    for around in ancestors(holdings[0].place):
        inner = {int(_value(flat, n)) for p, n in counts.items() if _beside(p, around)}
        if inner:
            return max(inner)
    return step


def _beside(place: str, around: str) -> bool:
    """Whether a count stands directly in `around`, or in a member of its chain."""
    outer, _, last = place.rpartition(".")
    return place == around or (outer == around and last.isdigit())


def _tell_waiting(flat: Flat, tree: StateTree, state: OptimizerState) -> None:
    """Gradients that MultiSteps has gathered are lost: torch keeps none in its optimizers."""
    waiting = [s for s in tree.spots if s.field == "mini_step"]
    if any(int(_value(flat, s.name)) for s in waiting):
        state.notices.append(
            "gradients that MultiSteps had gathered for the next update are left out"
        )
    strangers = set(tree.unknown.values())
    if isinstance(flat, Lazy):  # all of it is the optimizer's, and no class is known
        strangers |= {f"{s.place}.{s.field}".lstrip(".") for s in tree.strangers()}
    if strangers:
        state.notices.append(f"left out, no torch optimizer keeps it: {some(sorted(strangers))}")
