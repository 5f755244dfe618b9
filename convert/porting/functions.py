"""A function of torch code (a loss) as a torch module that holds the modules it mentions."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from zoo.containers.errors import UsageError


def of_function(function: Any) -> Any:
    """A torch module whose forward is the function. Its parts are the modules among the function's
    own variables, by the names that the function has for them; torch's own functions have none."""
    import torch

    held = mentioned(function)
    tensors = [n for n, x in held.items() if isinstance(x, torch.nn.Parameter)]
    if tensors:
        raise UsageError(
            f"{_name(function)} uses the parameter {tensors[0]}, which no module holds",
            "put it into a torch.nn.Module",
        )

    if any(isinstance(x, torch.optim.Optimizer) for x in held.values()):
        raise UsageError(
            f"{_name(function)} uses an optimizer of torch's, and a training step is not ported",
            "give the loss as a function, and take the step with nnx.Optimizer: convert.optim has "
            "torch's rules, and convert.load_optimizer a torch optimizer's state",
        )

    class Function(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, part in held.items():
                if isinstance(part, torch.nn.Module):
                    self.add_module(name, part)

    signature = inspect.signature(function)

    @functools.wraps(function)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    made = Function()
    made.forward = forward
    Function.__name__ = Function.__qualname__ = _name(function)
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return made


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
