"""Cotangents of every submodule's inputs and outputs, and gradients of parameters, in torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convert.runtime.arrays import is_float, leaves, replaced, to_numpy
from convert.runtime.call import Call
from convert.runtime.precision import torch_as_written
from convert.runtime.torch_calls import arguments, hooked
from convert.runtime.trace import Trace, array_arguments, with_arguments

# (name of the submodule, index of its call, "in" or "out", name of the array)
Place = tuple[str, int, str, str]


@dataclass
class Cotangents:
    """One backward pass. A place that the loss does not depend on has no cotangent."""

    at: dict[Place, np.ndarray] = field(default_factory=dict)
    parameters: dict[str, np.ndarray] = field(default_factory=dict)  # ties under each name


def backward(
    module: Any,
    call: Call,
    precision: str,
    forward: Trace,
    seeds: Mapping[str, np.ndarray],
    names: Collection[str],
    forced: Mapping[Place, np.ndarray] | None = None,
) -> Cotangents:
    """The pass from `seeds`, the cotangents of the model's outputs.

    At layers of `names` values are those that `forward` recorded. With `forced`, each place passes
    on the cotangent given there instead of the one that reached it, which is recorded.
    """
    import torch

    found = Cotangents()
    known = forward.by_key()
    counts: dict[str, int] = {}
    stack: list[int] = []
    dtype = getattr(torch, precision)
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())

    def gate(x: Any, place: Place, value: np.ndarray | None) -> Any:
        y = x.clone()
        if value is not None and value.shape == tuple(x.shape):
            y = y + (torch.from_numpy(np.array(value)).to(dtype) - y).detach()

        def hook(gradient: Any) -> Any:
            found.at[place] = to_numpy(gradient)
            if forced is None:
                return None
            return torch.from_numpy(forced.get(place, np.zeros(x.shape))).to(dtype).reshape(x.shape)

        if y.requires_grad:
            y.register_hook(hook)
        return y

    def gates(name: str, where: str, values: Mapping[str, Any]) -> dict[str, Any]:
        if name not in names:
            return {}
        index = stack[-1]
        record = known[name, index]
        right = record.inputs if where == "in" else record.outputs
        return {
            k: gate(v, (name, index, where, k), right.get(k))
            for k, v in values.items()
            if is_float(v)
        }

    def enter(name: str, part: Any, args: Any, kwargs: Any) -> Any:
        stack.append(counts.get(name, 0))
        counts[name] = stack[-1] + 1
        given = array_arguments(part.forward, args, kwargs)
        return with_arguments(part.forward, args, kwargs, gates(name, "in", given))

    def leave(name: str, part: Any, output: Any) -> Any:
        made = replaced(output, gates(name, "out", leaves(output)))
        stack.pop()
        return made

    args, kwargs = arguments(call, precision)
    for x in leaves((args, kwargs)).values():
        x.requires_grad_(is_float(x))
    with (
        torch_as_written(), torch.enable_grad(), torch.random.fork_rng(devices=[]),
        hooked(module, enter, leave),
    ):  # fmt: skip
        torch.manual_seed(0)
        output = leaves(module(*args, **kwargs))
        loss: Any = sum(
            (output[k] * torch.from_numpy(seeds[k]).to(dtype)).sum()
            for k in seeds
            if output[k].requires_grad
        )
        if isinstance(loss, torch.Tensor):
            loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in module.named_parameters(remove_duplicate=False):
        gradient = parameter.grad
        zeros = np.zeros(tuple(parameter.shape))
        found.parameters[name] = zeros if gradient is None else to_numpy(gradient)
    return found
