"""`convert.load_optimizer`: an optimizer's state out of any checkpoint, into either framework's."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from convert.training_state.rules import rules
from convert.training_state.state import UNCOUNTED, OptimizerState, TrainingState
from zoo import hub
from zoo.checkpoint.label import read_label
from zoo.checkpoint.request import as_layout
from zoo.containers import open_checkpoint
from zoo.containers.errors import MissingExtra, UsageError, ZooError
from zoo.layout import Layout

Source = str | os.PathLike[str] | OptimizerState
# (the module's own layout, the parameters that the target trains) -> as `_state`
Find = Callable[[Callable[[], Layout], Sequence[str]], tuple[OptimizerState, int | None]]


def load_optimizer(
    source: Source,
    target: Any,
    model: Any,
    *,
    layout: Any = None,
    learning_rate: float | None = None,
    check: bool = True,
    name: str | None = None,
    step: int | None = None,
) -> Any:
    """Fill an optimizer with the state in a checkpoint of either framework.

    `source` is a path of any checkpoint that holds an optimizer, or an OptimizerState. `model` is
    the module whose parameters `target` trains: in torch the one that the optimizer was made from,
    in Flax the NNX module. `target` is

    - a `torch.optim.Optimizer`: filled in place and returned;
    - an `nnx.Optimizer`: filled in place and returned;
    - an optax transformation: the tree of `tx.init(nnx.state(model, nnx.Param))`, filled, is
      returned.

    For a module that is not of the zoo, `layout` says what its tensors are, as in
    `convert.convert`; without, it is the one that came with the checkpoint, or in torch that of
    `convert.layout_of(model)`. `learning_rate` is the one at the last
    update, for a momentum that optax keeps times it, where neither the checkpoint nor the target
    tells. `check` tries an optax transformation against torch's rule and refuses one that does
    something else. `name` chooses among several optimizers; without, it is the one of the target's
    parameters. `step` is the number of updates so far where neither the state nor the checkpoint
    counts them.

    What a user should know is a `zoo.loading.LoadNotice`. Raises UsageError, changing nothing, with
    what was found and what to give.
    """
    layout = None if layout is None else as_layout(layout)
    find = functools.partial(_state, source, layout, learning_rate, name)
    if hasattr(target, "param_groups") and hasattr(target, "load_state_dict"):
        return _fill_torch(find, target, model, step)
    return _fill_flax(source, find, target, model, layout, learning_rate, check, step)


def _fill_torch(find: Find, target: Any, model: Any, step: int | None) -> Any:
    from convert.runtime.torch_layout import derive_layout
    from convert.training_state.canonical_names import layout_of, torch_names
    from convert.training_state.torch_state import fill_torch

    if not hasattr(model, "named_parameters"):
        raise UsageError(
            f"{type(model).__name__} is not a torch module, the optimizer is torch's",
            "give the module that the optimizer was made from",
        )

    def own() -> Layout:
        shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
        try:
            return layout_of(model, shapes, "torch")
        except UsageError:
            return derive_layout(model)[0]

    names = torch_names(model)
    trained = [names.get(id(p), "") for group in target.param_groups for p in group["params"]]
    state, at = find(own, trained)
    return fill_torch(_counted(state, at if step is None else step), target, model)


def _counted(state: OptimizerState, step: int | None) -> OptimizerState:
    """With `step` as its count, where it should have one and has none."""
    moments = [n for n in state.params if any(n in values for values in state.slots.values())]
    if step is None or state.steps or not moments or not rules()[state.rule].counts:
        return state
    notices = [n for n in state.notices if n != UNCOUNTED]
    return replace(state, steps=dict.fromkeys(moments, step), notices=notices)


def _fill_flax(
    source: Source,
    find: Find,
    target: Any,
    model: Any,
    layout: Layout | None,
    learning_rate: float | None,
    check: bool,
    step: int | None,
) -> Any:
    try:
        from flax import nnx
    except ImportError:
        raise MissingExtra("filling an optax state", "flax") from None
    from convert.runtime.nnx_names import respelled
    from convert.training_state.canonical_names import canonical_of
    from convert.training_state.optax_fill import fill_optax
    from convert.training_state.optax_leaves import fill_variables, flatten

    if not isinstance(model, nnx.Module):
        raise UsageError(
            f"{type(model).__name__} is not an NNX module, the optimizer is optax's",
            "give the NNX module whose parameters it trains",
        )
    whole = isinstance(target, nnx.Optimizer)
    if not whole and not (hasattr(target, "init") and hasattr(target, "update")):
        raise UsageError(
            f"{type(target).__name__} is not an optimizer",
            "give a torch.optim.Optimizer, an nnx.Optimizer or an optax transformation",
        )
    known = layout or _own_layout(source, model)
    spelled = respelled(known, model)
    params = nnx.state(model, target.wrt if whole else nnx.Param)
    of = canonical_of(spelled)
    present = [n.removesuffix(".value") for n in flatten(params)[0]]
    trained = [n for p in present for n in of.get(p, ())]
    state, at = find(lambda: known, trained)
    step = at if step is None else step
    filled = fill_optax(
        state,
        target.tx if whole else target,
        params,
        spelled,
        tree=target.opt_state if whole else None,
        learning_rate=learning_rate,
        check=check,
        step=step,
    )
    if not whole:
        return filled
    fill_variables(target, filled, max(state.steps.values(), default=step))
    return target


def _own_layout(source: Source, model: Any) -> Layout:
    """The layout of an NNX module: its family's, or the one that came with the checkpoint."""
    from convert.training_state.canonical_names import layout_of
    from convert.training_state.optax_state import module_shapes

    try:
        return layout_of(model, module_shapes(model))
    except UsageError:
        if isinstance(source, OptimizerState):
            raise
        with open_checkpoint(hub.locate(source)) as reader:
            label = read_label(reader)
        if label.layout is None:
            raise
        return label.layout


def _state(
    source: Source,
    given: Layout | None,
    learning_rate: float | None,
    name: str | None,
    own: Callable[[], Layout],
    trained: Sequence[str],
) -> tuple[OptimizerState, int | None]:
    """The state that is meant, and at which step the checkpoint says that it was saved."""
    if isinstance(source, OptimizerState):
        return source, None
    training = _read(source, given, own, learning_rate)
    found = training.optimizers
    if name is not None:
        chosen = [state for state in found if state.name == name]
    elif len(found) == 1:
        chosen = found
    else:
        chosen = [state for state in found if set(state.params) == set(trained)]
    if not found:
        raise UsageError(
            f"{source} holds no optimizer", "give a training checkpoint, or start a fresh optimizer"
        )
    if len(chosen) != 1:
        titles = ", ".join(state.name or "one without a name" for state in found)
        which = f"{len(chosen)} of them of the target's parameters"
        raise UsageError(
            f"{source} holds {len(found)} optimizers ({titles}), "
            + (which if name is None else f"none called {name!r}"),
            "choose one with name=...",
        )
    steps = (training.data.get(key) for key in ("global_step", "step"))
    return chosen[0], next((n for n in steps if type(n) is int), None)


def _read(
    source: str | os.PathLike[str],
    given: Layout | None,
    own: Callable[[], Layout],
    learning_rate: float | None,
) -> TrainingState:
    """By the layout of the weights beside the optimizer; where there are none, by the module's."""
    from convert.training_state.besides import read_training

    try:
        return read_training(source, learning_rate=learning_rate)
    except ZooError:
        try:
            layout = given or own()
        except ZooError:
            layout = None
        if layout is None:
            raise
    return read_training(source, layout=layout, learning_rate=learning_rate)
