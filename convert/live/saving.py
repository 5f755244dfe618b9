"""`convert.save`: a live module of either framework as a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.engine.commit import check_paths, check_replaceable, check_space
from convert.engine.execute import run
from convert.engine.prepare import Prepared, disk_needed
from convert.engine.targets import by_suffix, choose
from convert.live.module_reader import ModuleReader, framework_of
from convert.runtime.nnx_names import respelled
from convert.runtime.torch_layout import derive_layout
from convert.runtime.torch_module import unwrapped
from convert.training_state.data import is_plain, listed
from convert.training_state.optax_state import from_optax
from convert.training_state.state import OptimizerState, TrainingState
from convert.training_state.torch_state import from_torch
from zoo.checkpoint.certificate import Certificate
from zoo.checkpoint.label import Label
from zoo.checkpoint.plan import Plan, make_plan
from zoo.checkpoint.request import Request, as_layout, make_request
from zoo.containers.errors import UsageError, ZooError
from zoo.layout import Layout
from zoo.loading import LoadNotice
from zoo.registry import defined_by

_CONTAINERS = {"orbax": "flax", "msgpack": "flax", "safetensors": "torch", "pt": "torch"}


def save(
    module: Any,
    path: str | os.PathLike[str],
    layout: Any = None,
    config: Any = None,
    optimizer: Any = None,
    step: int | None = None,
    *,
    to: str | None = None,
    data: Mapping[str, Any] | None = None,
    learning_rate: float | None = None,
    max_shard_size: int | None = None,
    force: bool = False,
    verify: bool = True,
) -> Certificate:
    """Save a torch.nn.Module or nnx.Module; `path` appears whole and verified, or not at all.

    The container follows from the suffix of `path`, or is `to`: "safetensors" and "pt" hold the
    canonical tensors (torch's names and axes, whichever framework the module is of), "msgpack" and
    "orbax" (.flax) a Flax tree. Without either, a directory: of Orbax's for Flax, of safetensors
    for torch. What the tensors are is the family's to say for a module of the zoo, which
    keeps its `config`; else `layout` says it, as in `convert.convert`, and travels with the
    checkpoint. A torch module needs none: it has that of `convert.layout_of`, and so has what
    `convert.to_flax` made.

    `config` is, of the zoo, as in `convert.convert`; of any other module a mapping, or a JSON file,
    that is kept as the checkpoint's config.json (transformers' modules bring their own).
    `optimizer` is a torch optimizer, an nnx.Optimizer or a state of optax, or a dict of several by
    name; `learning_rate` is as in `convert.convert`. `step` and `data` (epoch, ...: what JSON
    holds) are kept beside it. `force` replaces an existing checkpoint, which stays until the new
    one is complete. What a user should know is a `zoo.loading.LoadNotice`.

    Raises ZooError, and then nothing is written.
    """
    place = Path(path)
    to = to or by_suffix(place) or ("orbax" if place.suffix == ".flax" else None)
    framework = framework_of(module)
    side = _CONTAINERS.get(to or "", framework)
    target = choose(place, place, to, side, max_shard_size)
    check_paths(target.path, None)
    check_replaceable(target.path, force)
    request, label, notices = _meant(module, framework, layout, config)
    with ModuleReader(module, _layout(request), label.carried) as reader:
        plan = _planned(reader, request, label, side)
        plan = dataclasses.replace(plan, told=(*notices, *plan.told))
        for notice in plan.told:
            warnings.warn(notice, LoadNotice, stacklevel=2)
        states = _states(optimizer, module, plan.layout, step, learning_rate)
        training = TrainingState(states, data=_data(step, data))
        check_space(target.path.parent, disk_needed(plan, target, training))
        notices = [*plan.notices]
        return run(Prepared(reader, plan, target, training, "bits", verify, force, notices))


def _planned(reader: ModuleReader, request: Request, label: Label, side: str) -> Plan:
    """Towards torch's names or NNX's, from what the module has."""
    try:
        return make_plan(
            reader,
            label,
            "torch" if side == "torch" else "nnx",
            request=request,
            sources=("torch",) if reader.framework == "torch" else ("nnx",),
        )
    except ZooError as e:
        advice = "give layout=..., a zoo.layout.Layout that says what its tensors are"
        if request.layout is not None:
            advice = "give the layout of this module"
        raise type(e)(e.problem, advice, e.details) from None


def _layout(request: Request) -> Layout | None:
    if request.model is None or request.config is None:
        return request.layout
    return request.model.layout_of(request.config)


def _meant(
    module: Any, framework: str, layout: Any, config: Any
) -> tuple[Request, Label, list[str]]:
    """What says what the tensors are, what the label keeps besides, and what to tell of it."""
    family = defined_by(unwrapped(module), framework)
    own = getattr(unwrapped(module), "config", None)
    if layout is None and family is not None:
        if config is not None and not isinstance(config, family.config):
            config = make_request(family.name, config).config
        return Request(family, config or own), Label(), []
    kept = Label(hf=_config(config, own))
    if framework == "flax":
        from convert.porting.live import LiveModule, carried

        if isinstance(module, LiveModule):
            kept = dataclasses.replace(kept, carried=carried(module))
            layout = module.layout if layout is None else layout
    if layout is not None:
        return Request(layout=as_layout(layout)), kept, []
    if framework == "torch":
        derived, notices = derive_layout(module)
        return Request(layout=derived), kept, notices
    return Request(), Label(), []


def _config(given: Any, own: Any) -> dict[str, Any]:
    """The config.json of a model of no family: what is given, or what transformers' module has."""
    if given is None and hasattr(own, "to_json_string"):
        given = json.loads(own.to_json_string())
    if isinstance(given, str | os.PathLike):
        try:
            given = json.loads(Path(given).read_text())
        except (OSError, ValueError, RecursionError) as e:
            raise UsageError(f"{given} is not read as JSON: {e}", "give a config.json") from None
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not is_plain(dict(given)):
        raise UsageError(
            f"the config is a {type(given).__name__}, or holds what JSON does not",
            "give a dict of plain values, or the path of a config.json",
        )
    return {k: listed(v) for k, v in given.items() if k != "zoo"}


def _data(step: int | None, data: Mapping[str, Any] | None) -> dict[str, Any]:
    kept = dict(data or {}) | ({} if step is None else {"step": int(step)})
    if wrong := [k for k, v in kept.items() if not is_plain(v)]:
        raise UsageError(
            f"data holds what JSON does not: {', '.join(map(str, wrong))}",
            "give numbers, texts, lists and dicts of them",
        )
    return {k: listed(v) for k, v in kept.items()}


def _states(
    optimizer: Any, module: Any, layout: Layout, step: int | None, learning_rate: float | None
) -> list[OptimizerState]:
    """The canonical state of each optimizer."""
    if optimizer is None:
        return []
    several = isinstance(optimizer, dict) and all(map(_is_optimizer, optimizer.values()))
    named = optimizer if several else {"": optimizer}
    states = []
    for name, one in named.items():
        if hasattr(one, "init") and hasattr(one, "update") and not _is_optimizer(one):
            raise UsageError(
                "the optimizer is an optax transformation, which holds no state",
                "give its state (opt_state), or an nnx.Optimizer",
            )
        if hasattr(one, "param_groups"):
            states.append(from_torch(one, model=unwrapped(module), name=name))
        else:
            own, rate = respelled(layout, module), learning_rate
            states.append(from_optax(one, own, learning_rate=rate, step=step, name=name))
    return states


def _is_optimizer(x: Any) -> bool:
    return hasattr(x, "param_groups") or (hasattr(x, "opt_state") and hasattr(x, "tx"))
