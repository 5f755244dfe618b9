"""Anybody's torch module as an nnx.Module that runs, trains and comes back."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from inspect import BoundArguments
from typing import Any, Literal

import numpy as np

from convert.porting.port_proof import LivePair, prove
from convert.porting.program_of import ImageAxes, Shapes, TorchProgram
from convert.porting.training_step import Step
from convert.program.calls import (
    bound,
    in_mode,
    larger,
    of_shapes,
    runs,
    shapes_of,
    with_tensors,
)
from convert.program.export import check_version, traced_graph
from convert.program.graph import Graph
from convert.program.opaque import Opaque
from convert.runtime.torch_layout import derive_layout, saved_tensors
from convert.runtime.torch_module import unwrapped
from convert.runtime.user_code import made
from convert.tensors import bits_of
from zoo.containers.errors import UsageError
from zoo.loading import LoadNotice

Rules = Mapping[Any, Callable[..., Any]]


def live_module(
    module: Any,
    inputs: Any,
    *,
    others: Sequence[Any] = (),
    rules: Rules | None = None,
    image_axes: ImageAxes = "first",
    verify: bool | Literal["gradients"] = True,
    untested: bool = False,
) -> Any:
    """What `convert.to_flax` does of a module that holds its weights."""
    check_version(untested)
    if image_axes not in ("first", "last"):
        raise UsageError(f"there is no image_axes {image_axes!r}", "it is 'first' or 'last'")
    module = torch_module(module)
    signature = inspect.signature(module.forward)
    calls = [bound(signature, module, one) for one in (inputs, *others)]
    with in_mode(module, training=False):
        program, first = program_of_call(module, signature, calls[0], rules or {}, image_axes)
        net = _live(program, module)
        graph = program.evaluation(False).graph
        for notice in graph.notices:
            warnings.warn(notice, LoadNotice, stacklevel=3)
        if verify:
            fitting = [one for one in calls if not graph.misfits(shapes_of(one))]
            gradients = verify == "gradients"
            program.report = prove(LivePair(module, program), first, fitting, gradients)
            program.prove = _prover(module, program, first, gradients)
        for one in calls:
            own = one if image_axes == "first" else with_tensors(one, _channels_last)
            program.fitting(False, own.args, own.kwargs)
    step = getattr(module, "_training_step", None)
    return net if step is None else _step(net, module, step, first, bool(verify))


def _step(net: Any, module: Any, step: Step, call: BoundArguments, verify: bool) -> Any:
    """The training step around a live function that was recorded as one."""
    from convert.porting.live_step import live_step, prove_step

    if step.trains:
        net.train()
    made = live_step(net, module, step)
    if verify:
        prove_step(made, module, step, call)
    return made


def torch_module(module: Any) -> Any:
    """The torch module that is meant: an instance, what a class or factory gives, or one around a
    function of torch code."""
    import torch

    from convert.porting.functions import of_function

    if isinstance(module, torch.nn.Module):
        return unwrapped(module)
    if inspect.isroutine(module) and _takes_arguments(module):
        return of_function(module)
    found = made(module, getattr(module, "__qualname__", str(module)), 0)
    if not isinstance(found, torch.nn.Module):
        raise UsageError(
            f"{type(found).__name__} is no torch module",
            "give a torch.nn.Module, or a class or function that gives one",
        )
    return unwrapped(found)


def _takes_arguments(function: Any) -> bool:
    every = inspect.signature(function).parameters.values()
    return any(p.default is p.empty and p.name != "self" for p in every)


def program_of_call(
    module: Any,
    signature: inspect.Signature,
    call: BoundArguments,
    rules: Rules,
    image_axes: ImageAxes,
) -> tuple[TorchProgram, BoundArguments]:
    """The program, and the call that it is traced of: one without sizes of 1 where that runs."""
    runs(module, call)
    traced = larger(module, call)
    opaque = tuple(Opaque(what, f) for what, f in rules.items() if not isinstance(what, str))
    named = {what: f for what, f in rules.items() if isinstance(what, str)}

    def trace(training: bool, shapes: Shapes | None) -> Graph:
        with in_mode(module, training):
            wanted = traced if shapes is None else of_shapes(traced, shapes)
            if shapes is not None:
                runs(module, wanted)
            return traced_graph(module, wanted, opaque)

    layout, notices = derive_layout(module)
    program = TorchProgram(type(module).__name__, signature, layout, trace, named, image_axes)
    program.opaque = opaque
    program.report.notices = notices
    return program, traced


def _prover(
    module: Any, program: TorchProgram, call: BoundArguments, gradients: bool
) -> Callable[[TorchProgram, Shapes], None]:
    """What proves a program of other sizes, and adds it to the report."""

    def proved(made: TorchProgram, shapes: Shapes) -> None:
        with in_mode(module, training=False):
            at, pair = of_shapes(call, shapes), LivePair(module, made)
            program.report.rows |= prove(pair, at, [at], gradients, others=False).rows

    return proved


def _channels_last(x: Any) -> Any:
    return x.moveaxis(1, -1) if x.ndim in (4, 5) and x.is_floating_point() else x


def _live(program: TorchProgram, module: Any) -> Any:
    """The module of the program, filled."""
    from flax import nnx

    from convert.porting.live import Buffer, LiveModule, placed

    state = saved_tensors(module)
    program.dtypes = {n: str(t.dtype).removeprefix("torch.") for n, t in state.items()}
    program.frozen = frozenset(n for n, t in module.named_parameters() if not t.requires_grad)
    every = dict(module.named_buffers(remove_duplicate=False)) | state
    by_name = program.by_name
    inside = {n: bits_of(t) for n, t in every.items() if by_name.flax_of(n) is not None}
    program.kept = {n: bits_of(t) for n, t in every.items() if n not in inside}
    buffers = {n for n, _ in module.named_buffers(remove_duplicate=False)}
    kinds: dict[str, Any] = {}
    for entry in program.layout.entries:
        statistic = entry.collection == "batch_stats"
        is_buffer = any(t.name in buffers for t in entry.torch)
        kind = nnx.BatchStat if statistic else Buffer if is_buffer else nnx.Param
        kinds |= {t.name: kind for t in entry.flax}
    values = by_name.flax(inside)
    whole = {n: np.ascontiguousarray(x).reshape(x.shape) for n, x in values.items()}
    return LiveModule(program, {n: (kinds[n], placed(n, x)) for n, x in whole.items()})


def to_state_dict(net: Any) -> dict[str, Any]:
    """The torch `state_dict` of a module that `convert.to_flax` made, bit for bit: torch tensors by
    torch's names, in torch's order and dtypes, tied ones shared; for `load_state_dict`.

    Raises UsageError for another module.
    """
    from convert.porting.live import LiveModule, torch_state
    from convert.porting.live_step import LiveStep

    net = net.net if isinstance(net, LiveStep) else net
    if not isinstance(net, LiveModule):
        raise UsageError(
            f"{type(net).__name__} is not a module that convert.to_flax made",
            "save it with convert.save(module, path, layout), and load that",
        )
    return torch_state(net)
