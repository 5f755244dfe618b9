"""A torch module as one side of a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from convert.compare.sides import Optimizer, Run, Side, Trained, loss_weights, real_parts
from convert.judge.noise import Arrays
from convert.runtime.arrays import dtype_in, is_inexact, named_outputs, to_numpy
from convert.runtime.call import Call
from convert.runtime.precision import precision_of
from convert.runtime.torch_calls import watched
from convert.runtime.torch_module import (
    beside,
    move,
    narrow_operation,
    norms,
    replica,
    shake,
    shaken,
    train_norms,
)
from convert.runtime.trace import Place
from zoo.containers.errors import UsageError


class TorchSide(Side):
    """`module` in eval mode. `moved` is for noise: a number other than None moves every weight and
    input by at most one unit in the last place, each number otherwise. So it does what rounding
    moves later: every output, of which no more is known, and each weight after each step."""

    framework = "torch"

    def __init__(self, module: Any, call: Call, *, seed: int = 0, moved: int | None = None) -> None:
        self.module = module
        self.call = call
        self.seed = seed
        self.moved = moved
        # Tensors that the other side may hold rounded otherwise (an LSTM's two biases as their sum,
        # constants that it computes): noise in float64 moves them by units of float32.
        self.combined: frozenset[str] = frozenset()
        self.held: frozenset[str] = frozenset()  # parameters that are not trained
        self.outputs: frozenset[str] | None = None  # those that are compared; None: all
        self.names = call.names(module.forward)

    def shaken(self, i: int) -> TorchSide:
        """The same with other rounding."""
        made = TorchSide(self.module, self.call, seed=self.seed, moved=i)
        made.combined, made.held, made.outputs = self.combined, self.held, self.outputs
        made.precisions, made.watched = self.precisions, self.watched
        return made

    def run(self, precision: str, *, backward: bool) -> Run:
        import torch

        seen: dict[Place, np.ndarray] = {}
        with precision_of(precision), torch.set_grad_enabled(backward):
            module = self.prepare(precision)
            args, kwargs, floats = self.given(module, precision, backward)
            torch.manual_seed(0)  # a module that draws numbers draws the same ones in every run
            with watched(module, seen):
                output = module(*args, **kwargs)
            named = self._named(output, self._generator())
            outputs = {k: to_numpy(v) for k, v in named.items()}
            intermediates = {k: x for k, x in self.named(seen).items() if x.dtype.kind in "fc"}
            if not backward:
                return Run(outputs, intermediates)
            loss = scalar(named, self.seed)
            parameters = dict(module.named_parameters())
            wanted = {n: p for n, p in parameters.items() if p.requires_grad}
            return Run(outputs, intermediates, loss.item(), _gradients(loss, wanted | floats))

    def train(self, precision: str, optimizer: Optimizer, steps: int) -> Trained:
        import torch

        with precision_of(precision), torch.enable_grad():
            module = self.prepare(precision)
            train_norms(module)
            given, _ = self._inputs(module, precision, False)
            args, kwargs = self.call.replaced(given)
            parameters = {
                n: p for n, p in module.named_parameters() if p.requires_grad and n not in self.held
            }
            if not parameters:
                raise UsageError(
                    "the torch module has no parameter to train",
                    "compare without training: level 'gradients'",
                )
            stepper = optimizer.torch(list(parameters.values()))
            generator = self._generator()
            losses: list[float] = []
            gradients: list[Arrays] = []
            for step in range(steps + 1):
                # The last loss is of the trained parameters; its statistics would be a step ahead.
                before = None if step < steps else _state(module)
                loss = scalar(self._named(module(*args, **kwargs), generator), self.seed)
                losses.append(loss.item())
                if before is not None:
                    return Trained(losses, before, gradients)
                stepper.zero_grad()
                loss.backward()
                for p in parameters.values():  # without one, torch would not decay its weight
                    p.grad = _or_zero(p.grad, p)
                gradients.append({n: to_numpy(p.grad) for n, p in parameters.items()})
                stepper.step()
                if generator is not None:
                    move(parameters.values(), generator)
        raise AssertionError("unreachable")

    def trains_norms(self) -> bool:
        """Whether any norm is in train mode when the module is."""
        return bool(train_norms(self.prepare("float32")))

    def still_norms(self) -> set[str]:
        """Those that are in eval mode even then."""
        module = self.prepare("float32")
        trained = {id(part) for part in train_norms(module)}
        every = {id(part) for part in norms(module)}
        return {n for n, part in module.named_modules() if id(part) in every - trained}

    def narrow_operation(self) -> str | None:
        with precision_of("float64"):
            module = self.prepare("float64")
            given, _ = self._inputs(module, "float64", False)
            return narrow_operation(module, Call(*self.call.replaced(given)))

    def prepare(self, precision: str) -> Any:
        """A copy in `precision`."""
        module = replica(self.module, precision)
        if self.moved is not None:
            shake(module, self.moved, self.combined)
        return module

    def given(self, module: Any, precision: str, backward: bool = True) -> tuple[Any, Any, Any]:
        """The arguments, args and kwargs, and those that are differentiated, as `in.NAME`."""
        given, floats = self._inputs(module, precision, backward)
        args, kwargs = self.call.replaced(given)
        return args, kwargs, {f"in.{self.names[k]}": x for k, x in floats.items()}

    def compared(self, output: Any) -> dict[str, Any]:
        """The outputs that are compared, by name."""
        return self._named(output, None)

    def _named(self, output: Any, generator: Any) -> dict[str, Any]:
        """The outputs that are compared, by name; moved where `moved` says so."""
        named = named_outputs(output)
        named = {k: x for k, x in named.items() if self.outputs is None or k in self.outputs}
        if generator is None:
            return named
        return {k: beside(x, generator) if is_inexact(x) else x for k, x in named.items()}

    def _generator(self) -> Any:
        """What moves are drawn from, the same in each run; None where nothing is moved."""
        import torch

        return None if self.moved is None else torch.Generator().manual_seed(self.moved)

    def _inputs(
        self, module: Any, precision: str, track: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """All inputs, and those that are differentiated."""
        import torch

        device = next((t.device for t in _tensors(module)), torch.device("cpu"))
        generator = torch.Generator().manual_seed(-1 if self.moved is None else self.moved)
        given, floats = {}, {}
        for name, array in self.call.arrays().items():
            x = torch.from_numpy(np.array(array))  # a copy: modules may write to their inputs
            if is_inexact(x):
                x = x.to(getattr(torch, dtype_in(x, precision)))
                x = x if self.moved is None else shaken(x, generator)
            given[name] = x.to(device)
            if track and is_inexact(x):
                floats[name] = given[name].requires_grad_()
        return given, floats


def scalar(named: Mapping[str, Any], seed: int) -> Any:
    """The loss: the sum of sin(x) times another number for every element of every output, of its
    real and of its imaginary part where it is complex."""
    import torch

    total: Any = torch.zeros(())
    for name, x in real_parts(named, lambda x: isinstance(x, torch.Tensor) and is_inexact(x)):
        weights = torch.from_numpy(loss_weights(name, tuple(x.shape), seed)).to(x)
        finite = torch.where(torch.isfinite(x), x, 0.0)  # masked logits
        total = total.to(x.device) + (torch.sin(finite) * weights).sum()
    if not total.requires_grad:
        raise UsageError(
            "no output of the torch module depends on its parameters or inputs by a gradient",
            "compare the outputs only: level 'outputs'",
        )
    return total


def _gradients(loss: Any, wanted: Mapping[str, Any]) -> Arrays:
    import torch

    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    pairs = zip(wanted.items(), found, strict=True)
    return {name: to_numpy(_or_zero(g, p)) for (name, p), g in pairs}


def _or_zero(gradient: Any, parameter: Any) -> Any:
    """What took no part has the gradient 0."""
    return parameter.new_zeros(parameter.shape) if gradient is None else gradient


def _state(module: Any) -> Arrays:
    """Parameters, and buffers of floating point."""
    found = dict(module.named_parameters()) | dict(module.named_buffers())
    return {n: to_numpy(t) for n, t in found.items() if is_inexact(t)}


def _tensors(module: Any) -> Iterator[Any]:
    yield from module.parameters()
    yield from module.buffers()
