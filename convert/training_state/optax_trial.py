"""A transformation's updates of made-up values, for `behaviour` to hold against torch's rule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from convert.training_state.behaviour import MOST_STEPS, Sample, Trial
from convert.training_state.optax_leaves import Content, fill_leaves, flatten, shapes_of
from convert.training_state.optax_tree import StateTree

_SMALL = 3  # elements along each axis of the parameters that a transformation is tried on
_SMALL_VECTOR = 8


def make_trial(
    content: Content,
    tree: StateTree,
    tx: Any,
    params: Any,
    names: Sequence[str],
    notices: list[str],
) -> Trial | None:
    """What is needed to try the transformation; None where the hyper-parameters are not known."""
    rule = content.rule
    stepped = [
        p
        for p in content.params
        if not rule.needs or all(p in content.slots.get(s, {}) for s in rule.needs)
    ]
    if rule.update is None or not stepped:
        return None
    if not all(rule.knows(content.options[p]) for p in stepped):
        return None
    groups: dict[int, tuple[list[str], Mapping[str, Any]]] = {}
    for p in stepped:
        options = content.options[p]
        groups.setdefault(id(options), ([], options))[0].append(p)
    shapes = {p: _tiny(s) for p, s in shapes_of(params).items()}
    slots = [s for s, values in content.slots.items() if values]
    trial = Trial(
        rule,
        shapes,
        list(groups.values()),
        {p: content.steps.get(p, content.step or 0) for p in stepped},
        slots,
        scales="momentum_buffer" in slots and any(h.scalable for h in tree.holdings),
        update=_Updates(tx, params, tree, content),
    )
    import jax

    with jax.enable_x64(True):
        tiny = flatten(tx.init(_like(params, shapes)))[0]
        same = list(map(_bare, tiny)) == list(map(_bare, names))
    if not same:
        notices.append(
            "the transformation divides parameters by their sizes: whether it follows torch's rule "
            "is not checked"
        )
        return None
    return trial


def _tiny(shape: tuple[int, ...]) -> tuple[int, ...]:
    most = _SMALL_VECTOR if len(shape) < 2 else _SMALL
    return tuple(min(n, most) for n in shape)


def _bare(name: str) -> str:
    """A leaf's name without what an nnx.Variable adds."""
    return name.removesuffix(".value")


def _like(params: Any, values: Mapping[str, Any]) -> Any:
    """A tree like `params` with float64 values by name; shapes give ones."""
    import jax
    import jax.numpy as jnp

    names, _, structure = flatten(params)
    made = [values[_bare(n)] for n in names]
    arrays = [jnp.ones(v) if isinstance(v, tuple) else jnp.asarray(v) for v in made]
    return jax.tree.unflatten(structure, arrays)


def _disturbed(tree: StateTree, leaves: Sequence[Any]) -> list[Any]:
    """With other than fresh values where torch keeps nothing (an average of the updates): what
    depends on them follows no rule of torch's."""
    import jax.numpy as jnp

    return [
        jnp.ones_like(leaf)
        if s.param is not None
        and s.place in tree.unknown
        and jnp.issubdtype(leaf.dtype, jnp.inexact)
        else leaf
        for s, leaf in zip(tree.spots, leaves, strict=True)
    ]


@dataclass(frozen=True)
class _Updates:
    """Makes single updates of made-up values, in float64 and on the CPU."""

    tx: Any
    params: Any
    tree: StateTree
    content: Content

    @functools.cached_property
    def accumulates(self) -> bool:
        """Whether several calls are needed before there is an update."""
        return any(s.field == "mini_step" for s in self.tree.spots)

    @functools.cached_property
    def update(self) -> Callable[..., Any]:
        """The transformation's; compiled where it would otherwise be traced at every call."""
        import jax

        update: Callable[..., Any] = jax.jit(self.tx.update) if self.accumulates else self.tx.update
        return update

    def __call__(
        self, sample: Sample, scale: Mapping[str, float], later: int
    ) -> tuple[dict[str, np.ndarray], int]:
        """As `Trial.update` says."""
        import jax

        with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
            weights = _like(self.params, sample.params)
            gradients = _like(self.params, sample.gradients)
            _, leaves, structure = flatten(self.tx.init(weights))
            step = self.content.step
            stepped = replace(
                self.content,
                slots=sample.slots,
                steps={p: n + later for p, n in self.content.steps.items()},
                step=None if step is None else step + later,
            )
            made = fill_leaves(self.tree, leaves, stepped, scale, [])
            filled = jax.tree.unflatten(structure, _disturbed(self.tree, made))
            calls = 0
            while calls < MOST_STEPS:
                updates, filled = self.update(gradients, filled, weights)
                calls += 1
                names, values, _ = flatten(updates)
                if not self.accumulates or any(np.any(np.asarray(v)) for v in values):
                    break
            found = {
                _bare(n): np.asarray(v, np.float64) for n, v in zip(names, values, strict=True)
            }
            return found, calls
