"""`convert.load`: a checkpoint into a definition of one's own, live, in either framework."""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from convert.live.module_reader import framework_of
from convert.matching.match_tensors import match_tensors
from convert.runtime.inputs import as_call
from convert.runtime.nnx_names import variables_of
from convert.runtime.torch_calls import record
from convert.runtime.torch_layout import derive_layout, saved_tensors, ties_of
from convert.runtime.torch_module import unwrapped
from convert.runtime.user_code import made
from convert.tensors import to_torch
from zoo import hub
from zoo.checkpoint.label import Label, read_label
from zoo.checkpoint.plan import Plan, make_plan, refuse_broken_ties
from zoo.checkpoint.problems import Problems
from zoo.checkpoint.request import UNSTATED, Request, as_layout
from zoo.containers import dtypes, open_checkpoint
from zoo.containers.base import Reader
from zoo.containers.errors import UsageError, ZooError
from zoo.layout import Layout, Shape, Tree
from zoo.loading import FRAMEWORKS, LoadNotice, read_tree


def load(
    path: str | os.PathLike[str],
    framework: str,
    definition: Any,
    inputs: Any = None,
    *,
    layout: Any = None,
    seed: int = 0,
    sharding: Any = None,
) -> Any:
    """The checkpoint at `path`, of any container and either framework, in a module of your own.

    `definition` is a torch.nn.Module or nnx.Module, which is filled and returned; or a class or
    function that gives one without arguments (in Flax with `rngs=nnx.Rngs(seed)` where it asks for
    them). It is in eval mode afterwards, and holds every tensor in the dtype that is stored.

    What the tensors are is said by `layout` (as in `convert.convert`), else by the layout that came
    with the checkpoint, else, for torch, by `convert.layout_of(definition)`, and for Flax by
    `convert.match(path, definition)`. `inputs`, as `verify` takes them, are for torch's lazy
    layers, which have their sizes from one run; and for a torch definition that is wanted in Flax,
    which is then made live by `convert.to_flax(definition, inputs)`. `sharding`, for a definition
    in Flax, says which devices hold what, as `zoo.load` takes it: a process reads what its own
    hold. What a user should know is a `zoo.loading.LoadNotice`. Raises ZooError with everything
    that does not fit, before anything is filled.
    """
    if framework not in FRAMEWORKS:
        raise UsageError(f"there is no framework {framework!r}", "it is 'torch' or 'flax'")
    name = getattr(definition, "__qualname__", type(definition).__name__)
    module = made(definition, name, seed)
    if sharding is not None and (framework != "flax" or framework_of(module) != "flax"):
        raise UsageError("sharding is for a definition in Flax", "leave it out, or give one")
    if framework == "flax" and framework_of(module) == "torch":
        return _live(path, module, inputs, layout)
    if framework_of(module) != framework:
        raise UsageError(
            f"{name} is a module of {framework_of(module)}, and {framework} was asked for",
            "give the definition of that framework",
        )
    if inputs is not None and framework == "torch":
        record(module.eval(), as_call(inputs), "float32")
    given = None if layout is None else as_layout(layout)
    with open_checkpoint(hub.locate(path), prefer=framework) as reader:
        plan = _planned(reader, module, framework, given)
        notices = [*plan.told, *plan.left.unused()]
        refuse_broken_ties(reader, plan)
        if framework == "torch":
            _fill_torch(module, plan, reader)
        else:
            notices += _fill_flax(module, plan, reader, sharding)
    for notice in notices:
        warnings.warn(notice, LoadNotice, stacklevel=2)
    module.eval()
    return module


def _live(path: str | os.PathLike[str], module: Any, inputs: Any, layout: Any) -> Any:
    """A torch definition, filled and made live in Flax."""
    from convert.porting.to_flax import live_module

    if inputs is None:
        raise UsageError(
            f"{type(module).__name__} is a torch definition: it is traced of one call",
            "give inputs=..., as its forward takes them, or a definition in Flax",
        )
    return live_module(load(path, "torch", module, layout=layout), inputs)


def with_weights(module: Any, weights: Any) -> Any:
    """A copy of the module that holds a checkpoint's values, or those of a state_dict."""
    module = copy.deepcopy(module)
    if not isinstance(weights, Mapping):
        return load(weights, "torch", module)
    held = saved_tensors(module)
    wrong = [f"{n} is missing" for n in held if n not in weights]
    wrong += [f"{n} is not a tensor of the module" for n in weights if n not in held]
    wrong += [
        f"{n} is {tuple(weights[n].shape)}, and {tuple(t.shape)} in the module"
        for n, t in held.items()
        if n in weights and tuple(weights[n].shape) != tuple(t.shape)
    ]
    if wrong:
        raise UsageError(
            f"the weights are not those of {type(module).__name__}", "give its own", wrong
        )
    given = {n: x if hasattr(x, "detach") else to_torch(np.asarray(x)) for n, x in weights.items()}
    module.load_state_dict(given, assign=any(t.is_meta for t in held.values()))
    return module


def _planned(reader: Reader, module: Any, framework: str, given: Layout | None) -> Plan:
    tree: Tree = "torch" if framework == "torch" else "nnx"
    label = read_label(reader)
    if given is not None:
        return make_plan(reader, label, tree, request=Request(layout=given))
    try:
        plan = make_plan(reader, label, tree, request=UNSTATED)
        named = label.layout is not None or label.model is not None
        if framework == "torch" or named or not _FlaxSide(module, plan).problems():
            return plan
    except ZooError:
        if label.layout is not None or label.problem is not None:
            raise
    if framework == "torch":
        found, notices = derive_layout(module)
    else:
        found = match_tensors(reader.path, module)
        notices = list(found.notices)
    plan = make_plan(reader, Label(), tree, request=Request(layout=found))
    return dataclasses.replace(plan, told=(*plan.told, *notices))


def _fill_torch(module: Any, plan: Plan, reader: Reader) -> None:
    from zoo.loading import into_torch

    module = unwrapped(module)
    state = saved_tensors(module)
    same = ties_of(state)
    made_here = {m.name for m in plan.made} - state.keys()
    given = {n: i.shape for n, i in plan.target_tensors().items() if n not in made_here}
    repeats = {n: to for n, to in plan.ties.items() if n in state and n not in same}
    given |= {n: given[to] for n, to in repeats.items()}
    there = {same.get(n, n) for n in given}
    held = {
        n: tuple(t.shape) for n, t in state.items() if n in given or same.get(n, n) not in there
    }
    _check(reader, module, _problems(given, held))
    values = _repeated(read_tree(plan, reader, into_torch.empty), repeats)
    if any(t.is_meta for t in state.values()):
        _check_computed(module)
        into_torch.fill(module, derive_layout(module)[0], values)
        return
    for name, array in values:
        if name in state:
            tensor = into_torch.owned(array)
            state[name].data = tensor.to(state[name].device)


def _repeated(
    values: Iterator[tuple[str, Any]], repeats: Mapping[str, str]
) -> Iterator[tuple[str, Any]]:
    """The values, and again under the second names that the module does not tie itself."""
    for name, array in values:
        yield name, array
        yield from ((n, array.copy()) for n, to in repeats.items() if to == name)


def _check_computed(module: Any) -> None:
    """UsageError for tensors on "meta" that no checkpoint holds: the module's code makes them."""
    saved = module.state_dict(keep_vars=True)
    if lost := [n for n, t in module.named_buffers() if t.is_meta and n not in saved]:
        raise UsageError(
            f"{lost[0]} is computed by the module's own code, and has no values on 'meta'",
            "give the class, or a module that was not made on 'meta'",
        )


class _FlaxSide:
    """What an NNX module holds, beside what a plan has for it."""

    def __init__(self, module: Any, plan: Plan) -> None:
        self.targets = plan.target_tensors()
        weights, others = variables_of(module, self.targets)
        self.variables = weights | {n: v for n, v in others.items() if n in self.targets}
        buffers = {t.name for e in plan.layout.entries if e.collection == "buffers" for t in e.flax}
        self.unwanted = sorted(buffers - self.variables.keys())

    def problems(self) -> Problems:
        """Weights that one of both lacks, or has in another shape."""
        given = {n: i.shape for n, i in self.targets.items() if n not in self.unwanted}
        held = {n: tuple(v.get_value().shape) for n, v in self.variables.items()}
        return _problems(given, held)


def _fill_flax(module: Any, plan: Plan, reader: Reader, sharding: Any) -> list[str]:
    from zoo.loading.into_flax import check_width, place
    from zoo.loading.into_shards import read_shards, shardings

    side = _FlaxSide(module, plan)
    _check(reader, module, side.problems())
    for name in side.variables:  # what JAX would cut is refused before anything is filled
        check_width(name, dtypes.NUMPY[side.targets[name].dtype])
    read: Iterable[tuple[str, Any]]
    if sharding is None:
        read = ((n, place(n, x)) for n, x in read_tree(plan, reader) if n in side.variables)
    else:
        shapes = {n: i.shape for n, i in side.targets.items() if n in side.variables}
        read = read_shards(plan, reader, shardings(sharding, shapes))
    for name, array in read:
        side.variables[name].set_value(array)
    told = ", ".join(side.unwanted)
    return [f"buffers that the Flax definition does not have: {told}"] if told else []


def _problems(given: Mapping[str, Shape], held: Mapping[str, Shape]) -> Problems:
    return Problems(
        missing={n: s for n, s in held.items() if n not in given},
        surplus=[n for n in given if n not in held],
        misshaped={n: (s, held[n]) for n, s in given.items() if n in held and s != held[n]},
    )


def _check(reader: Reader, module: Any, problems: Problems) -> None:
    """UsageError, listing everything, unless the checkpoint holds what the definition does."""
    if not problems:
        return
    count = len(problems)
    raise UsageError(
        f"{reader.path} is not of {type(module).__name__}: {count} "
        f"{'tensor differs' if count == 1 else 'tensors differ'}",
        "give a definition with these names, or layout=... that says which is which",
        problems.lines(),
    )
