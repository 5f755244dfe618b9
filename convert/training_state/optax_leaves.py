"""The leaves of a tree of optax states, and what goes into them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.training_state.canonical_names import canonical_of, some, to_flax
from convert.training_state.optax_tree import COUNTS, Holding, Spot, StateTree
from convert.training_state.rules import Rule, rules
from convert.training_state.state import OptimizerState
from zoo.checkpoint.apply import lost
from zoo.checkpoint.problems import dims
from zoo.containers import dtypes
from zoo.containers.errors import UsageError
from zoo.layout import Layout


@dataclass
class Content:
    """A state by the parameters of a Flax tree: moments already through their weights' ops."""

    rule: Rule
    params: list[str]
    slots: dict[str, dict[str, np.ndarray]]
    steps: dict[str, int]  # only those that are known
    options: dict[str, Mapping[str, Any]]
    step: int | None = None  # where parameters do not count

    def latest(self, params: Iterable[str] = ()) -> int | None:
        """The number of updates that a count over these parameters, or all, shows."""
        found = [self.steps[p] for p in params if p in self.steps] or list(self.steps.values())
        return max(found) if found else self.step


def flatten(tree: Any) -> tuple[list[str], list[Any], Any]:
    """Dotted names and values of the leaves, and the structure."""
    import jax

    pairs, structure = jax.tree_util.tree_flatten_with_path(tree)
    return [".".join(map(_key, path)) for path, _ in pairs], [leaf for _, leaf in pairs], structure


def _key(key: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def shapes_of(params: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a tree of parameters."""
    names, leaves, _ = flatten(params)
    return {
        n.removesuffix(".value"): tuple(leaf.shape) for n, leaf in zip(names, leaves, strict=True)
    }


def content_of(
    state: OptimizerState, layout: Layout, step: int | None, notices: list[str]
) -> Content:
    """The state by the layout's Flax names. Steps within one tensor must agree."""
    ties = {e.torch[0].name: e.tied_to for e in layout.entries if e.tied_to is not None}
    rule = rules()[state.rule]

    def named(values: Mapping[str, Any]) -> dict[str, Any]:
        return {ties.get(n) or n: values[n] for n in values}

    options = {ties.get(n) or n: g.options for g in state.groups for n in g.params}
    steps = named(state.steps)
    content = Content(rule, [], {}, {}, {}, step)
    of = canonical_of(layout)
    unknown = options.keys() - {n for names in of.values() for n in names}
    if unknown:
        raise UsageError(
            f"the state is not of this model: it has no {some(sorted(unknown))}",
            "give the model that the checkpoint is of",
        )
    for param, canonical in of.items():
        there = [n for n in canonical if n in options]
        if not there:
            continue
        content.params.append(param)
        content.options[param] = options[there[0]]
        counted = {steps[n] for n in there if n in steps}
        if len(counted) > 1:
            raise _differing(f"{some(there)}, which are one tensor in Flax", counted)
        if counted:
            content.steps[param] = counted.pop()
    for slot, values in state.slots.items():
        if slot in rule.scalars:
            every = named(values)
            content.slots[slot] = {
                p: np.asarray(every[n])
                for p, canonical in of.items()
                for n in canonical[:1]
                if n in every
            }
        elif values:
            content.slots[slot] = to_flax(named(values), layout)
    if step is None and not content.steps and any(content.slots.values()):
        notices.append(f"{rule.name} does not count its updates: schedules start at 0 (step=...)")
    return content


def _differing(what: str, steps: Iterable[int]) -> UsageError:
    told = ", ".join(map(str, sorted(steps)))
    return UsageError(
        f"the numbers of updates differ ({told}) among {what}",
        "optax counts them together: train them in parts, such as those of optax.multi_transform",
    )


def fill_leaves(
    tree: StateTree,
    leaves: Sequence[Any],
    content: Content,
    scale: Mapping[str, float],
    notices: list[str],
) -> list[Any]:
    """The leaves with the content in their places; what it does not have stays as it was."""
    holdings = {h.place: h for h in tree.holdings}
    made = []
    for spot, leaf in zip(tree.spots, leaves, strict=True):
        held = holdings.get(spot.place)
        slot = held.fields.get(spot.field) if held else None
        value: Any = None
        if spot.param is not None:
            value = content.slots.get(slot or "", {}).get(spot.param)
            if value is not None and slot == "momentum_buffer" and spot.param in scale:
                value = _times(value, -scale[spot.param])
        elif spot.hyper:
            value = _hyper(spot, leaf, tree, content, notices)
        elif slot is not None and held is not None:
            value = _shared(slot, held, content)
        elif spot.field in COUNTS:
            value = _count(spot, held, tree, content)
        made.append(leaf if value is None else _placed(np.asarray(value), leaf, notices))
    return made


def _times(array: np.ndarray, factor: float) -> np.ndarray:
    """Scaled with one rounding."""
    return (array.astype(np.float64) * factor).astype(array.dtype)


def _count(spot: Spot, held: Holding | None, tree: StateTree, content: Content) -> int | None:
    """The number of updates. What counts for moments must be the same for all of them."""
    if held is None:
        return content.latest(tree.scope(spot.place))
    steps = {content.steps[p] for p in held.params if p in content.steps}
    if len(steps) > 1:
        raise _differing(some(held.params), steps)
    if steps:
        return steps.pop()
    started = any(p in values for values in content.slots.values() for p in held.params)
    return (content.step or 1) if started else content.step  # SGD's first gradient is another


def _shared(slot: str, held: Holding, content: Content) -> Any:
    """A number that torch keeps for each parameter, and one state for all of its own."""
    values = [content.slots[slot][p] for p in held.params if p in content.slots.get(slot, {})]
    if len({v.tobytes() for v in values}) > 1:
        told = {float(v) for v in values}
        raise UsageError(
            f"{slot} differs ({', '.join(f'{v:.6g}' for v in sorted(told))}) among "
            f"{some(held.params)}",
            "give each group of torch's its own part of an optax.multi_transform",
        )
    return values[0] if values else None


def _hyper(
    spot: Spot, leaf: Any, tree: StateTree, content: Content, notices: list[str]
) -> float | None:
    """An injected hyper-parameter, where the checkpoint knows it."""
    key = "lr" if spot.field == "learning_rate" else content.rule.hyperparams.get(spot.field, "")
    name, _, index = key.partition(".")
    params = tree.scope(spot.place) or content.params
    found = [content.options[p].get(name) for p in params if p in content.options]
    known = [v[int(index)] if index else v for v in found if v is not None]
    if not known or np.ndim(leaf) != 0:
        return None
    if len(set(known)) > 1:
        notices.append(
            f"{spot.field} stays {float(leaf):.6g}: the groups of the checkpoint have "
            + ", ".join(f"{v:.6g}" for v in sorted(set(known)))
        )
        return None
    value = float(known[0])
    if np.asarray(value, np.asarray(leaf).dtype) != np.asarray(leaf):
        notices.append(f"{spot.field} is {value:.6g} as in the checkpoint, not {float(leaf):.6g}")
    return value


def _placed(array: np.ndarray, leaf: Any, notices: list[str]) -> Any:
    """The array in the leaf's dtype and place."""
    import jax

    kind = np.dtype(leaf.dtype)
    if array.ndim == 0 and array.dtype == np.float64 and kind == np.float32 and _wide():
        kind = array.dtype  # torch kept its product in float64
    if array.shape != np.shape(leaf):
        raise UsageError(
            f"a state of {dims(array.shape)} for one of {dims(np.shape(leaf))}",
            "give the model that the checkpoint is of",
        )
    if array.dtype != kind and array.size > 1:
        source, target = dtypes.code_of(array.dtype), dtypes.code_of(kind)
        with np.errstate(over="ignore"):
            if dtypes.itemsize(source) > dtypes.itemsize(target) or lost(array, array.astype(kind)):
                notices.append(f"moments are rounded from {array.dtype} to {kind}")
    with np.errstate(over="ignore"):
        made = array.astype(kind)
    if getattr(leaf, "committed", False):
        return jax.device_put(made, leaf.sharding)
    return jax.numpy.asarray(made)


def _wide() -> bool:
    import jax

    return bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]


def fill_variables(optimizer: Any, tree: Any, step: int | None) -> None:
    """Put the values of a filled tree into an nnx.Optimizer's own variables."""
    import jax
    from flax import nnx

    every = jax.tree.leaves(optimizer.opt_state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    variables = [v for v in every if jax.tree.leaves(v)]  # those of a masked parameter are empty
    values = jax.tree.leaves(tree)
    for variable, value in zip(variables, values, strict=True):
        variable.set_value(value)
    if step is not None:
        optimizer.step.set_value(jax.numpy.asarray(step, optimizer.step.get_value().dtype))
