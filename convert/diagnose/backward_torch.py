"""Cotangents of every submodule's inputs and outputs, and gradients of parameters, in torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convert.runtime.arrays import is_float, leaves, replaced, to_numpy
from convert.runtime.call import Call
from convert.runtime.precision import torch_as_written
from convert.runtime.torch_calls import arguments, hooked
from convert.runtime.trace import Recorded, array_arguments, with_arguments

# (name of the submodule, index of its call, "in" or "out", name of the array)
Place = tuple[str, int, str, str]
Calls = Mapping[tuple[str, int], Recorded]  # by name of the submodule and index of its call


@dataclass
class Cotangents:
    """One backward pass. A place that the loss does not depend on has no cotangent."""

    at: dict[Place, np.ndarray] = field(default_factory=dict)
    parameters: dict[str, np.ndarray] = field(default_factory=dict)  # ties under each name


def backward(
    module: Any,
    call: Call,
    precision: str,
    calls: Calls,
    seeds: Mapping[str, np.ndarray],
    forced: Mapping[Place, np.ndarray] | None = None,
) -> Cotangents:
    """The pass from `seeds`, the cotangents of the model's outputs.

    The inputs and outputs of `calls` are places: they take the values recorded there. With
    `forced`, each place passes on the cotangent given there instead of the one that reached it,
    which is recorded.
    """
    import torch

    gates = _Gates(calls, forced, getattr(torch, precision))
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    args, kwargs = arguments(call, precision)
    for x in leaves((args, kwargs)).values():
        x.requires_grad_(is_float(x))
    with (
        torch_as_written(), torch.enable_grad(), torch.random.fork_rng(devices=[]),
        hooked(module, gates.enter, gates.leave),
    ):  # fmt: skip
        torch.manual_seed(0)
        output = leaves(module(*args, **kwargs))
        loss: Any = sum(
            (output[k] * torch.from_numpy(seeds[k]).to(gates.dtype)).sum()
            for k in seeds
            if output[k].requires_grad
        )
        if isinstance(loss, torch.Tensor):
            loss.backward()  # type: ignore[no-untyped-call]
    found = Cotangents(gates.cotangents)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        gradient = parameter.grad
        zeros = np.zeros(tuple(parameter.shape))
        found.parameters[name] = zeros if gradient is None else to_numpy(gradient)
    return found


class _Gates:
    """Hooks that put a gate at every input and output of the recorded calls."""

    def __init__(self, calls: Calls, forced: Mapping[Place, np.ndarray] | None, dtype: Any) -> None:
        self.calls, self.forced, self.dtype = calls, forced, dtype
        self.cotangents: dict[Place, np.ndarray] = {}
        self.counts: dict[str, int] = {}
        self.stack: list[int] = []  # the index of each call that runs

    def enter(self, name: str, part: Any, args: Any, kwargs: Any) -> Any:
        """The arguments behind gates."""
        self.stack.append(self.counts.get(name, 0))
        self.counts[name] = self.stack[-1] + 1
        given = array_arguments(part.forward, args, kwargs)
        return with_arguments(part.forward, args, kwargs, self._gates(name, "in", given))

    def leave(self, name: str, part: Any, output: Any) -> Any:
        """The output behind gates."""
        made = replaced(output, self._gates(name, "out", leaves(output)))
        self.stack.pop()
        return made

    def _gates(self, name: str, where: str, values: Mapping[str, Any]) -> dict[str, Any]:
        index = self.stack[-1]
        record = self.calls.get((name, index))
        if record is None:
            return {}
        right = record.inputs if where == "in" else record.outputs
        return {
            k: self._gate(v, (name, index, where, k), right.get(k))
            for k, v in values.items()
            if is_float(v)
        }

    def _gate(self, x: Any, place: Place, value: np.ndarray | None) -> Any:
        """`value` forward; backward notes the cotangent, and passes on the forced one."""
        import torch

        y = x.clone()
        if value is not None and value.shape == tuple(x.shape):
            y = y + (torch.from_numpy(np.array(value)).to(self.dtype) - y).detach()

        def hook(gradient: Any) -> Any:
            self.cotangents[place] = to_numpy(gradient)
            if self.forced is None:
                return None
            forced = self.forced.get(place, np.zeros(x.shape))
            return torch.from_numpy(forced).to(self.dtype).reshape(x.shape)

        if y.requires_grad:
            y.register_hook(hook)
        return y
