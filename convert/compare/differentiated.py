"""torch's run of a loss, recorded operation by operation, so that the gradient of every value on
its way can be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.compare.torch_side import TorchSide, scalar
from convert.diagnose.causes import Reason
from convert.judge.noise import Arrays
from convert.program.operations import Operation, find, mapped, short_name
from convert.program.tape import tape
from convert.runtime.arrays import to_numpy
from convert.runtime.torch_calls import hooked


@dataclass(frozen=True)
class Place:
    """Where gradients part, and why."""

    reason: Reason
    module: str
    source: str | None


class Differentiated:
    """One forward pass of torch with its operations recorded, and the gradients of the loss.

    `stop`: an expression, by its position and name, whose results, or one of whose operands, are
    detached in every run of it. `through`: (which of the values that torch frees from gradients is
    not freed,), None for all.
    """

    def __init__(
        self, reference: TorchSide, precision: str, stop: Any = None, through: Any = None
    ) -> None:
        import torch

        self.stop, self.through = stop, through
        self.freed: list[str] = []  # in their order: "detach", or "stretch" without gradients
        self.users = False
        self.mode = tape(Differentiated.__init__.__code__)
        self._call, self.mode.call = self.mode.call, self._operation
        module = reference.prepare(precision)
        parameters = dict(module.named_parameters())
        for name, t in [*parameters.items(), *module.named_buffers()]:
            self.mode.leaf(t, name, "parameter" if name in parameters else "buffer")
        stack: list[str] = []

        def enter(name: str, part: Any, args: Any, kwargs: Any) -> Any:
            stack.append(self.mode.module)
            self.mode.module = name
            return args, kwargs

        def leave(name: str, part: Any, output: Any) -> Any:
            self.mode.module = stack.pop()
            return output

        with torch.enable_grad():
            args, kwargs, floats = reference.given(module, precision)
            torch.manual_seed(0)
            with hooked(module, enter, leave), _freed(self), self.mode:
                self.mode.muted = 0
                output = module(*args, **kwargs)
                self.mode.muted = 1
            self.loss = scalar(reference.compared(output), reference.seed)
            self.wanted = {n: p for n, p in parameters.items() if p.requires_grad} | floats
            self.total = self.of(self.loss, None)

    def _operation(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        import torch

        site = (self.mode.site or self.mode.place()) if self.stop else None
        if site is None or (site.position, short_name(name)) != self.stop[0]:
            return self._call(name, self._users(func), args, kwargs)
        where = self.stop[1]
        tensors = list(find((args, kwargs), torch.Tensor))

        def free(x: Any) -> Any:
            kept = not isinstance(x, torch.Tensor) or (where >= 0 and x is not tensors[where])
            return x if kept else x.detach()

        if where >= 0:
            return func(*mapped(tuple(args), free), **mapped(dict(kwargs), free))
        return mapped(func(*args, **kwargs), free)

    def _users(self, func: Any) -> Any:
        """The function, known to be called by the user's code and not by the tape's own."""

        def called(*args: Any, **kwargs: Any) -> Any:
            self.users = True
            try:
                return func(*args, **kwargs)
            finally:
                self.users = False

        return called

    def of(self, tensor: Any, cotangent: Any) -> Arrays:
        """The gradients of a value, by parameter and input."""
        import torch

        made = torch.autograd.grad(
            tensor, list(self.wanted.values()), cotangent, retain_graph=True, allow_unused=True
        )
        return {
            n: np.zeros(tuple(p.shape)) if g is None else to_numpy(g)
            for (n, p), g in zip(self.wanted.items(), made, strict=True)
        }

    def cotangents(self, tensors: list[Any]) -> list[Any]:
        """What comes back to each of these from the loss."""
        import torch

        return list(torch.autograd.grad(self.loss, tensors, retain_graph=True, allow_unused=True))


def _freed(run: Differentiated) -> Any:
    """Counts what torch frees from gradients: values detached, stretches without; and frees not."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Freed(TorchFunctionMode):
        def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            stretch = f is torch._C._set_grad_enabled and args == (False,)
            if (run.users and f in (torch.Tensor.detach, torch.detach)) or stretch:
                kept = run.through is not None and run.through[0] in (None, len(run.freed))
                run.freed.append("stretch" if stretch else "detach")
                if kept:
                    return None if stretch else args[0].clone()
            return f(*args, **(kwargs or {}))

    return Freed()


def shown(operation: Operation) -> tuple[str, str | None]:
    """The expression, and its file and line."""
    site = operation.site
    return (operation.name, None) if site is None else (site.shown, site.place)
