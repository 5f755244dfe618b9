"""The state of a torch.optim.Optimizer, to canonical form and back."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from convert.tensors import bits_of
from convert.training_state.canonical_names import bare, some, torch_names
from convert.training_state.rules import Rule, rule_of, rules
from convert.training_state.state import Group, OptimizerState
from zoo.checkpoint.apply import lost
from zoo.checkpoint.problems import dims
from zoo.containers import dtypes
from zoo.containers.errors import UsageError
from zoo.loading import LoadNotice

# How a step is computed, not what: of the machine and the optimizer at hand, never of a checkpoint.
_RUNTIME = {"params", "param_names", "foreach", "fused", "capturable", "differentiable"}
# One and the same state; what differs is told by the options.
_SAME = {"Adam", "AdamW", "RAdam"}


def from_torch(
    source: Any,
    names: Sequence[str] | None = None,
    *,
    model: Any = None,
    rule: str | None = None,
    name: str = "",
) -> OptimizerState:
    """The canonical state of a torch optimizer, or of what its `state_dict()` gave.

    Names come, first of these that there is, from `names` (all parameters in the order in which
    the optimizer was given them, group after group), from an optimizer and its `model` (the very
    parameter objects tell), from the groups' `param_names` (an optimizer made from named
    parameters), or from the order of `model.parameters()`, where one group has all of them.
    `rule` is torch's class name, where it is known. Raises UsageError for what cannot be told.
    """
    live = hasattr(source, "param_groups")
    state_dict = source.state_dict() if live else source
    groups, kept = state_dict["param_groups"], state_dict["state"]
    if live:
        rule = rule or _class(source)
    slots = {slot for state in kept.values() for slot in state if state[slot] is not None}
    rule = rule or rule_of(groups[0], slots - {"step"})
    if rule is None or rule not in rules():
        raise UsageError(
            f"an optimizer that is not known: options {some(sorted(groups[0]))}, "
            f"states {some(sorted(slots)) or 'none'}",
            f"known are {', '.join(rules())}; a plugin can add one (docs/layout.md)",
        )
    keys = [key for group in groups for key in group["params"]]
    told = _names(source if live else None, groups, keys, names, model)
    state = OptimizerState(
        rule=rule,
        groups=[Group(tuple(told[key] for key in g["params"]), _options(g)) for g in groups],
        slots={},
        steps={},
        name=name,
    )
    made: dict[str, dict[str, np.ndarray]] = {s: {} for s in rules()[rule].slots if s in slots}
    for key in keys:
        for slot, value in kept.get(key, {}).items():
            if slot == "step":
                state.steps[told[key]] = int(_plain(value))
            elif slot in made and value is not None:
                made[slot][told[key]] = _array(value)
    state.slots = made
    if strange := sorted(slots - made.keys() - {"step"}):
        state.notices.append(f"{rule} does not keep {some(strange)}: left out")
    return state


def fill_torch(state: OptimizerState, optimizer: Any, model: Any) -> Any:
    """Fill `optimizer`, which trains parameters of `model`, in place, and return it.

    What is kept gets the dtype and device of its parameter, as torch's `load_state_dict` would have
    it. Hyper-parameters are taken from the state where its groups are the optimizer's and tell
    them; else the optimizer keeps its own, and a LoadNotice says so. Raises UsageError, and changes
    nothing, where parameters, shapes or the kind of optimizer are not the same.
    """
    name = _class(optimizer)
    rule = rules().get(name)
    if rule is None:
        raise UsageError(
            f"{type(optimizer).__name__} is not an optimizer that is known",
            f"known are {', '.join(rules())}; a plugin can add one (docs/layout.md)",
        )
    objects = [list(group["params"]) for group in optimizer.param_groups]
    names = torch_names(model, state.params)
    if strangers := sum(id(p) not in names for group in objects for p in group):
        raise UsageError(
            f"{strangers} of the optimizer's parameters are not the model's",
            "give the very module whose parameters the optimizer was made from",
        )
    target = [[names[id(p)] for p in group] for group in objects]
    _check_names(state, [n for group in target for n in group])
    options, notices = _merge(state, optimizer.param_groups, target)
    _check_rule(state, rule, options)
    parameters = {
        n: p for g, ns in zip(objects, target, strict=True) for n, p in zip(ns, g, strict=True)
    }
    option_of = {n: o for o, ns in zip(options, target, strict=True) for n in ns}
    made = {n: _for(state, rule, n, parameters[n], option_of[n], notices) for n in parameters}
    # Only now, when nothing can be refused any more, is anything changed.
    for group, new in zip(optimizer.param_groups, options, strict=True):
        group.update({k: v for k, v in new.items() if k not in _RUNTIME})
    for n, p in parameters.items():
        if made[n]:
            optimizer.state[p] = made[n]
        else:
            optimizer.state.pop(p, None)
    for notice in dict.fromkeys([*state.notices, *notices]):
        warnings.warn(notice, LoadNotice, stacklevel=2)
    return optimizer


def _class(optimizer: Any) -> str:
    """The name of its class, or of the nearest above it that is known: subclasses keep a state."""
    for cls in type(optimizer).__mro__:
        if cls.__name__ in rules():
            return cls.__name__
    return type(optimizer).__name__


def _names(
    optimizer: Any,
    groups: Sequence[Mapping[str, Any]],
    keys: Sequence[Any],
    names: Sequence[str] | None,
    model: Any,
) -> dict[Any, str]:
    if names is None and optimizer is not None and model is not None:
        of = torch_names(model)
        objects = [p for group in optimizer.param_groups for p in group["params"]]
        if gone := sum(id(p) not in of for p in objects):
            raise UsageError(
                f"{gone} of the optimizer's parameters are not the model's",
                "give the very module whose parameters the optimizer was made from",
            )
        names = [of[id(p)] for p in objects]
    if names is None and all(len(g.get("param_names", ())) == len(g["params"]) for g in groups):
        names = [bare(n) for group in groups for n in group["param_names"]]
    if names is None and model is not None and len(groups) == 1:
        names = list(dict.fromkeys(torch_names(model).values()))
    if names is None:
        raise UsageError(
            f"the optimizer's {len(keys)} parameters in {len(groups)} groups have no names",
            "give names=..., the names in the order of its groups, or make the optimizer from "
            "model.named_parameters()",
        )
    if len(names) != len(keys) or len(set(names)) != len(names):
        raise UsageError(
            f"{len(names)} names ({len(set(names))} different) for {len(keys)} parameters",
            "give each parameter that the optimizer was made from its own name, in that order",
        )
    return dict(zip(keys, names, strict=True))


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options as plain values: a learning rate may be a tensor."""
    return {
        key: tuple(map(_plain, v)) if isinstance(v, tuple | list) else _plain(v)
        for key, v in group.items()
        if key not in ("params", "param_names")
    }


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") and hasattr(value, "dtype") else value


def _array(value: Any) -> np.ndarray:
    """A copy of a tensor, bit for bit, or of a number."""
    return bits_of(value) if hasattr(value, "detach") else np.array(value)


def _check_names(state: OptimizerState, target: Sequence[str]) -> None:
    given = set(state.params)
    missing = [n for n in target if n not in given]
    surplus = [n for n in state.params if n not in set(target)]
    if missing or surplus:
        raise UsageError(
            f"the state has {len(given)} parameters, the optimizer {len(target)}, and "
            f"{len(missing) + len(surplus)} are not in both",
            "make the optimizer from the parameters that were trained, of the same model",
            [f"only in the optimizer: {some(missing)}"] * bool(missing)
            + [f"only in the state: {some(surplus)}"] * bool(surplus),
        )


def _merge(
    state: OptimizerState, groups: Sequence[Mapping[str, Any]], target: Sequence[Sequence[str]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Each group's options after loading, and what to tell of it."""
    own = [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in groups]
    theirs: list[dict[str, Any] | None] = [
        next((g.options for g in state.groups if set(g.params) == set(names)), None)
        for names in target
    ]
    if any(options is None for options in theirs):
        # Where all groups of the state agree, how they are divided does not matter.
        first = state.groups[0].options
        if any(g.options != first for g in state.groups[1:]):
            told = (
                f"the optimizer has {len(own)} groups, the state {len(state.groups)} others: "
                "hyper-parameters are the optimizer's own"
            )
            return own, [told]
        theirs = [first] * len(own)
    merged, unknown, changed = [], set(), set()
    for mine, options in zip(own, theirs, strict=True):
        known = {k: v for k, v in (options or {}).items() if v is not None and k not in _RUNTIME}
        if "amsgrad" in mine:  # Adam or AdamW: which of the two is the optimizer's own
            known.pop("decoupled_weight_decay", None)
        unknown |= mine.keys() - known.keys() - _RUNTIME - {"maximize", "decoupled_weight_decay"}
        changed |= {f"{k} {mine[k]} to {v}" for k, v in known.items() if k in mine and mine[k] != v}
        merged.append({**mine, **known})
    notices = []
    if changed:
        notices.append(
            "set as the checkpoint has it, as load_state_dict does: " + ", ".join(sorted(changed))
        )
    if unknown:
        notices.append(
            "the checkpoint does not tell these hyper-parameters, which are the optimizer's own: "
            + ", ".join(sorted(unknown))
        )
    return merged, notices


def _check_rule(state: OptimizerState, rule: Rule, options: Sequence[Mapping[str, Any]]) -> None:
    """UsageError unless the state is one of this optimizer with these options."""
    if state.rule == rule.name or not any(state.slots.values()):
        pass
    elif not {state.rule, rule.name} <= _SAME:
        raise UsageError(
            f"the state is of {state.rule}, the optimizer is {rule.name}",
            f"make a torch.optim.{state.rule}, or start {rule.name} afresh",
        )
    elif any(_differs(state.rule, rule.name, g.options) for g in state.groups):
        raise UsageError(
            f"the state is of {state.rule}, whose updates are not those of {rule.name}",
            f"make a torch.optim.{state.rule}, or start {rule.name} afresh",
        )


def _differs(given: str, wanted: str, options: Mapping[str, Any]) -> bool:
    """Whether updates of these two, whose states are alike, are told to differ."""
    if "RAdam" in (given, wanted):
        return options.get("betas") is not None
    told = given == "AdamW" or "decoupled_weight_decay" in options  # not before torch 2.8
    return told and bool(options.get("weight_decay"))


def _for(
    state: OptimizerState,
    rule: Rule,
    name: str,
    parameter: Any,
    options: Mapping[str, Any],
    notices: list[str],
) -> dict[str, Any]:
    """What torch keeps for one parameter."""
    found = {slot: state.slots[slot] for slot in state.slots if name in state.slots[slot]}
    steps = state.steps.get(name)
    if not found and not steps:
        return _started(rule, options, parameter)
    kept = rule.kept(options)
    if rule.name == "SGD" and not found:
        return {}
    if kept != found.keys():
        lacks = f"lacks {', '.join(sorted(kept - found.keys()))}" if kept - found.keys() else ""
        more = f"has {', '.join(sorted(found.keys() - kept))}" if found.keys() - kept else ""
        raise UsageError(
            f"{name}: the state {' and '.join(filter(None, (lacks, more)))}, unlike a "
            f"{rule.name} of these options",
            "make the optimizer with the options (momentum, centered, amsgrad) of the one that "
            "was trained",
        )
    made: dict[str, Any] = {}
    if rule.counts:
        if steps is None:
            notices.append("the checkpoint does not count the updates: torch's step is 0")
        made["step"] = _scalar(float(steps or 0), parameter, options)
    for slot, arrays in found.items():
        array = np.asarray(arrays[name])
        if slot in rule.scalars:
            made[slot] = _scalar(array.item(), parameter, options, array.dtype == np.float64)
            continue
        if array.shape != tuple(parameter.shape):
            raise UsageError(
                f"{slot} of {name} is {dims(array.shape)}, the parameter is "
                f"{dims(tuple(parameter.shape))}",
                "give the model that the checkpoint is of",
            )
        made[slot] = _tensor(array, parameter, name, notices)
    return made


def _started(rule: Rule, options: Mapping[str, Any], parameter: Any) -> dict[str, Any]:
    """What torch has before the first step: nothing, but for Adagrad."""
    if rule.name != "Adagrad":
        return {}
    import torch

    start = float(options.get("initial_accumulator_value") or 0.0)
    total = torch.full_like(parameter, start, memory_format=torch.preserve_format).detach()
    return {"step": _scalar(0.0, parameter, options), "sum": total}


def _scalar(
    value: float, parameter: Any, options: Mapping[str, Any], keep_wide: bool = False
) -> Any:
    """A count as torch keeps it: on the CPU, in float32 unless the default dtype is float64."""
    import torch

    there = bool(options.get("capturable") or options.get("fused"))
    wide = torch.get_default_dtype() == torch.float64 and not options.get("fused")
    dtype = torch.float64 if wide or keep_wide else torch.float32
    return torch.tensor(value, dtype=dtype, device=parameter.device if there else "cpu")


def _tensor(array: np.ndarray, parameter: Any, name: str, notices: list[str]) -> Any:
    """The array in the parameter's dtype, device and memory format."""
    import torch

    from convert.tensors import to_torch

    source = to_torch(array)
    if source.dtype != parameter.dtype:
        code = dtypes.FROM_NAME[str(parameter.dtype).removeprefix("torch.")]
        wide = dtypes.itemsize(dtypes.code_of(array.dtype)) > dtypes.itemsize(code)
        if wide or lost(array, array.astype(dtypes.NUMPY[code])):
            told = str(source.dtype).removeprefix("torch.")
            notices.append(
                f"moments are rounded from {told} to {parameter.dtype}, as parameters are"
            )
    made = torch.empty_like(parameter, memory_format=torch.preserve_format, requires_grad=False)
    return made.copy_(source)
