"""A function of torch code (a loss, a training step) as a torch module that holds the modules it
mentions."""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any

from convert.porting.training_step import recorded
from zoo.containers.errors import UsageError


def of_function(function: Any) -> Any:
    """A torch module whose forward is the function. Its parts are the modules among the function's
    own variables, by the names that the function has for them; torch's own functions have none.

    Of a function that steps an optimizer, forward gives the loss beside what it returns;
    `_training_step` is what was recorded of the rest.
    """
    import torch

    held = mentioned(function)
    tensors = [n for n, x in held.items() if isinstance(x, torch.nn.Parameter)]
    if tensors:
        raise UsageError(
            f"{_name(function)} uses the parameter {tensors[0]}, which no module holds",
            "put it into a torch.nn.Module",
        )
    if any(isinstance(x, torch.optim.lr_scheduler.LRScheduler) for x in held.values()):
        raise UsageError(
            f"{_name(function)} uses a scheduler, whose steps no graph has",
            "give the loss alone, and a schedule as the rate of a rule of convert.optim",
        )
    parts = {n: x for n, x in held.items() if isinstance(x, torch.nn.Module)}
    optimizers = [x for x in held.values() if isinstance(x, torch.optim.Optimizer)]
    run, step = function, None
    if optimizers:
        run, step = recorded(function, optimizers, list(parts.values()))

    class Function(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, part in parts.items():
                self.add_module(name, part)
            self._training_step = step

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with contextlib.ExitStack() as stack:
                for name, part in parts.items():
                    if self._modules[name] is not part:  # this is a copy of the module
                        stack.enter_context(_as(part, self._modules[name]))
                return run(*args, **kwargs)

    made = Function()
    Function.__name__ = Function.__qualname__ = _name(function)
    signature = inspect.signature(function)
    me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    own: Any = Function.forward
    own.__signature__ = signature.replace(parameters=[me, *signature.parameters.values()])
    return made


@contextlib.contextmanager
def _as(module: Any, other: Any) -> Any:
    """The module with the tensors and the mode of its copy: a function finds the module itself."""
    from torch.nn.utils.stateless import _reparametrize_module

    tensors = dict(other.named_parameters()) | dict(other.named_buffers())
    modes = {part: part.training for part in module.modules()}
    with _reparametrize_module(module, tensors):
        module.train(other.training)
        try:
            yield
        finally:
            for part, training in modes.items():
                part.training = training


def mentioned(function: Any) -> dict[str, Any]:
    """What a function finds outside of its arguments: of closures, globals, partial, methods."""
    if isinstance(function, functools.partial):
        bound = {f"argument{i}": x for i, x in enumerate(function.args)}
        return mentioned(function.func) | bound | dict(function.keywords)
    found: dict[str, Any] = {}
    if inspect.ismethod(function):
        found |= dict(vars(function.__self__)) if hasattr(function.__self__, "__dict__") else {}
        function = function.__func__
    code = getattr(function, "__code__", None)
    if code is None:
        return found
    variables = inspect.getclosurevars(function)
    return found | dict(variables.globals) | dict(variables.nonlocals)


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
