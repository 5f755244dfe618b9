"""The state of an optax optimizer, live or in a checkpoint, to canonical form."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
    found = _Source(flat, tree, layout, "nnx", learning_rate, step).states(name)
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
            spelled = read_tree(flat, params)
            count = sum(len(h.params) for h in spelled.holdings) + len(spelled.refused)
            if best is None or count > best[0]:
                best = (count, _renamed(spelled, params), tree_name)
    assert best is not None
    _, tree, tree_name = best
    found = _Source(flat, tree, layout, tree_name, learning_rate, step).states(name)
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


@dataclass(frozen=True)
class _Source:
    """A tree to read: its leaves by name, what stands where, and what it may not tell."""

    flat: Flat
    tree: StateTree
    layout: Layout
    tree_name: Tree
    learning_rate: float | None
    step: int | None

    def states(self, name: str) -> list[OptimizerState]:
        """One state for each rule that is found."""
        tree = self.tree
        check_tree(tree)
        canonical = canonical_of(self.layout, self.tree_name)
        parts: dict[tuple[str, ...], list[str]] = {}  # places -> the parameters kept in them
        for param in canonical:
            if places := tuple(h.place for h in tree.holdings_of(param)):
                parts.setdefault(places, []).append(param)
        by_rule: dict[str, dict[tuple[str, ...], list[str]]] = {}
        for places, params in parts.items():
            by_rule.setdefault(_rule(tree, params[0]).name, {})[places] = params
        if not by_rule:
            return [self.without_moments(canonical, name)]
        states = []
        for rule, of_rule in by_rule.items():
            label = name if len(by_rule) == 1 else _label(next(iter(of_rule))[0]) or name
            state = OptimizerState(rule, [], {}, {}, label)
            moments: dict[str, Lazy] = {}
            scalars: dict[str, dict[str, np.ndarray]] = {}
            for places, params in of_rule.items():
                names = tuple(dict.fromkeys(n for p in params for n in canonical[p]))
                holdings = self.add_group(state, places, names)
                self.add_moments(moments, holdings, params, state.groups[-1].options)
                for slot, value in self.numbers(holdings, rules()[rule]).items():
                    scalars.setdefault(slot, {}).update(dict.fromkeys(names, value))
            if rules()[rule].counts and not state.steps:
                state.notices.append(UNCOUNTED)
            state.slots = {
                s: scalars[s]
                if s in scalars
                else to_canonical(moments[s], self.layout, self.tree_name)
                for s in rules()[rule].slots
                if s in moments or s in scalars
            }
            self.tell_what_is_left_out(state)
            states.append(state)
        return states

    def without_moments(
        self, canonical: Mapping[str, tuple[str, ...]], name: str
    ) -> OptimizerState:
        """Plain SGD: nothing but counts and hyper-parameters."""
        if self.tree.unknown:
            raise UsageError(
                f"no optimizer that is known: it keeps {', '.join(self.tree.unknown.values())}",
                f"known are {', '.join(rules())}",
            )
        names = tuple(dict.fromkeys(n for group in canonical.values() for n in group))
        told = "the optimizer keeps no moments: taken for SGD without momentum"
        group = Group(names, self.options("", rules()["SGD"]))
        return OptimizerState("SGD", [group], {}, {}, name, [told])

    def add_group(
        self, state: OptimizerState, places: Sequence[str], names: tuple[str, ...]
    ) -> list[Holding]:
        """Add the parameters whose moments are in the same places, which are returned."""
        rule = rules()[state.rule]
        holdings = [h for h in self.tree.holdings if h.place in places]
        state.groups.append(Group(names, self.options(places[0], rule)))
        steps = self.steps(holdings)
        if steps is not None and rule.counts:
            state.steps |= dict.fromkeys(names, steps)
        return holdings

    def add_moments(
        self,
        into: dict[str, Lazy],
        holdings: Sequence[Holding],
        params: Sequence[str],
        options: Mapping[str, Any],
    ) -> None:
        """Add the arrays of some parameters by slot; none is read but for its shape."""
        rate = self.learning_rate if self.learning_rate is not None else options.get("lr")
        divide, wanted = _divisor(self.tree, holdings, rate), set(params)
        fields = {h.place: h.fields for h in holdings}
        for spot in self.tree.spots:
            slot = fields.get(spot.place, {}).get(spot.field)
            if slot is None or spot.param is None or spot.param not in wanted:
                continue
            read = functools.partial(self.value, spot.name)
            if slot == "momentum_buffer" and divide is not None:
                read = functools.partial(_divided, read, divide)
            into.setdefault(slot, Lazy()).add(spot.param, self.info(spot.name), read)

    def value(self, name: str) -> np.ndarray:
        """One leaf."""
        value = self.flat[name]
        return np.asarray(value() if callable(value) else value)

    def info(self, name: str) -> TensorInfo:
        """Its dtype and shape."""
        if isinstance(self.flat, Lazy):
            return self.flat.infos[name]
        value = self.flat[name]
        array = value() if callable(value) else value
        return TensorInfo(code_of(np.dtype(array.dtype)), tuple(array.shape))

    def numbers(self, holdings: Sequence[Holding], rule: Rule) -> dict[str, np.ndarray]:
        """Slots that one state keeps as one number for all its parameters."""
        places = {h.place for h in holdings}
        return {
            s.field: self.value(s.name)
            for s in self.tree.spots
            if s.place in places and s.param is None and s.field in rule.scalars
        }

    def options(self, place: str, rule: Rule) -> dict[str, Any]:
        """The hyper-parameters that were injected nearest around a place, by torch's names."""
        for around in ancestors(place):
            injected = {s.field: s.name for s in self.tree.spots if s.hyper and s.place == around}
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
                    betas[int(index)] = _decimal(self.value(name))
                else:
                    found[base] = _decimal(self.value(name))
            if len(betas) == 2:
                found["betas"] = (betas[0], betas[1])
            return found
        return {}

    def steps(self, holdings: Sequence[Holding]) -> int | None:
        """The count beside the moments, else the one that is nearest around them, else `step`."""
        spots = (s for s in self.tree.spots if s.field in COUNTS and s.param is None)
        counts = {s.place: s.name for s in spots}
        for h in holdings:
            if h.place in counts:
                return int(self.value(counts[h.place]))
        for around in ancestors(holdings[0].place):
            inner = {int(self.value(n)) for p, n in counts.items() if _beside(p, around)}
            if inner:
                return max(inner)
        return self.step

    def tell_what_is_left_out(self, state: OptimizerState) -> None:
        """Gradients that MultiSteps has gathered, and what no torch optimizer keeps."""
        waiting = [s for s in self.tree.spots if s.field == "mini_step"]
        if any(int(self.value(s.name)) for s in waiting):
            state.notices.append(
                "gradients that MultiSteps had gathered for the next update are left out"
            )
        strangers = set(self.tree.unknown.values())
        if isinstance(self.flat, Lazy):  # all of it is the optimizer's, and no class is known
            strangers |= {f"{s.place}.{s.field}".lstrip(".") for s in self.tree.strangers()}
        if strangers:
            told = f"left out, no torch optimizer keeps it: {some(sorted(strangers))}"
            state.notices.append(told)


def _rule(tree: StateTree, param: str) -> Rule:
    """The first rule that keeps what is kept of a parameter: Adam stands for AdamW and RAdam,
    whose states are alike."""
    slots = tree.slots_of(param)
    return next(r for r in rules().values() if set(r.needs) <= slots <= set(r.slots))


def _label(place: str) -> str:
    """The part of a multi_transform in which a place lies."""
    parts = place.split(".")
    return parts[parts.index("inner_states") + 1] if "inner_states" in parts[:-1] else ""


def _divided(read: Read, divisor: float) -> np.ndarray:
    """Unscaled with one rounding."""
    array = read()
    return (array.astype(np.float64) / divisor).astype(array.dtype)


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


def _decimal(value: Any) -> float:
    """The number that somebody wrote: 0.1, not the float32 nearest to it."""
    array = np.asarray(value)
    return float(str(array.item() if array.dtype == np.float64 else array.astype(np.float32)))


def _beside(place: str, around: str) -> bool:
    """Whether a count stands directly in `around`, or in a member of its chain."""
    outer, _, last = place.rpartition(".")
    return place == around or (outer == around and last.isdigit())
