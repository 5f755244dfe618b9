"""A torch module as one side of a comparison."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from convert.compare.sides import Optimizer, Run, Side, Trained
from convert.judge.noise import Arrays, loss_weights, named_outputs, precision_of
from convert.runtime.call import Call, argument_names, leaves, with_leaves
from zoo.containers.errors import UsageError

# module, args, kwargs -> output, and intermediates by name
Forward = Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[Any, Mapping[str, Any]]]


def plain(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A forward pass without intermediates."""
    return module(*args, **kwargs), {}


def with_taps(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward pass of a twin of the zoo."""
    return module(*args, **kwargs, taps=True)


class TorchSide(Side):
    """`module` in eval mode. `forward` says how intermediates are recorded; `moved` is for noise:
    a number other than None moves every weight and input by at most one unit in the last place,
    each number otherwise."""

    framework = "torch"

    def __init__(
        self,
        module: Any,
        call: Call,
        forward: Forward = plain,
        *,
        seed: int = 0,
        moved: int | None = None,
    ) -> None:
        self.module = module
        self.call = call
        self.forward = forward
        self.seed = seed
        self.moved = moved
        # Parameters that the other side may hold combined, and so rounded to float32 once more (an
        # LSTM's two biases as their sum): noise in float64 moves them by units of float32.
        self.combined: frozenset[str] = frozenset()
        self.names = argument_names(module.forward, call)

    def shaken(self, i: int) -> TorchSide:
        """The same with other rounding."""
        made = TorchSide(self.module, self.call, self.forward, seed=self.seed, moved=i)
        made.combined = self.combined
        return made

    def run(self, precision: str, *, backward: bool) -> Run:
        import torch

        with precision_of(precision), torch.set_grad_enabled(backward):
            module = self.prepare(precision)
            given, floats = self._inputs(module, precision, backward)
            args, kwargs = with_leaves(self.call, given)
            output, taps = self.forward(module, args, kwargs)
            named = named_outputs(output)
            outputs = {k: to_numpy(v) for k, v in {**taps, **named}.items()}
            if not backward:
                return Run(outputs)
            loss = scalar(named, self.seed)
            parameters = dict(module.named_parameters())
            wanted = {n: p for n, p in parameters.items() if p.requires_grad}
            wanted |= {f"in.{self.names[k]}": x for k, x in floats.items()}
            return Run(outputs, loss.item(), _gradients(loss, wanted))

    def train(self, precision: str, optimizer: Optimizer, steps: int) -> Trained:
        import torch

        with precision_of(precision), torch.enable_grad():
            module = self.prepare(precision)
            for part in norms(module):
                part.train()
            given, _ = self._inputs(module, precision, False)
            args, kwargs = with_leaves(self.call, given)
            parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
            if not parameters:
                raise UsageError(
                    "the torch module has no parameter to train",
                    "compare without training: level 'gradients'",
                )
            stepper = optimizer.torch(list(parameters.values()))
            losses: list[float] = []
            gradients: list[Arrays] = []
            for step in range(steps + 1):
                # The last loss is of the trained parameters; its statistics would be a step ahead.
                before = None if step < steps else _state(module)
                loss = scalar(named_outputs(self.forward(module, args, kwargs)[0]), self.seed)
                losses.append(loss.item())
                if before is not None:
                    return Trained(losses, before, gradients)
                stepper.zero_grad()
                loss.backward()
                gradients.append({n: to_numpy(_or_zero(p.grad, p)) for n, p in parameters.items()})
                stepper.step()
        raise AssertionError("unreachable")

    def prepare(self, precision: str) -> Any:
        """A copy in `precision`."""
        import torch

        try:
            module = copy.deepcopy(self.module)
        except Exception as e:
            raise UsageError(
                f"the torch module cannot be copied: {type(e).__name__}: {e}",
                "give one that copy.deepcopy takes; it must not change the module itself",
            ) from e
        module = module.to(getattr(torch, precision))
        if self.moved is not None:
            generator = torch.Generator().manual_seed(self.moved)
            with torch.no_grad():
                for name, t in [*module.named_parameters(), *module.named_buffers()]:
                    rough = name in self.combined and t.is_floating_point()
                    x = t.detach().float() if rough else t.detach()
                    t.copy_(_moved(x, generator))
        return module

    def _inputs(
        self, module: Any, precision: str, track: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """All inputs, and those that are differentiated."""
        import torch

        device = next((t.device for t in _tensors(module)), torch.device("cpu"))
        generator = torch.Generator().manual_seed(-1 if self.moved is None else self.moved)
        given, floats = {}, {}
        for name, array in leaves(self.call).items():
            x = torch.from_numpy(np.array(array))  # a copy: modules may write to their inputs
            if x.is_floating_point():
                x = x.to(getattr(torch, precision))
                x = x if self.moved is None else _moved(x, generator)
            given[name] = x.to(device)
            if track and x.is_floating_point():
                floats[name] = given[name].requires_grad_()
        return given, floats


def scalar(named: Mapping[str, Any], seed: int) -> Any:
    """The loss: the sum of sin(x) times another number for every element of every output."""
    import torch

    total: Any = torch.zeros(())
    for name, x in named.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            weights = torch.from_numpy(loss_weights(name, tuple(x.shape), seed)).to(x)
            finite = torch.where(torch.isfinite(x), x, 0.0)  # masked logits
            total = total.to(x.device) + (torch.sin(finite) * weights).sum()
    if not total.requires_grad:
        raise UsageError(
            "no output of the torch module depends on its parameters or inputs by a gradient",
            "compare the outputs only: level 'outputs'",
        )
    return total


def norms(module: Any) -> Iterator[Any]:
    """Layers that keep running statistics: in training mode the others would only drop."""
    for part in module.modules():
        if getattr(part, "running_mean", None) is not None:
            yield part


def to_numpy(x: Any) -> np.ndarray:
    """A tensor, or a number, on the CPU; what NumPy lacks (bfloat16) as float32."""
    import torch

    if not isinstance(x, torch.Tensor):
        return np.asarray(x)
    x = x.detach()
    if x.is_floating_point() and x.dtype not in (torch.float16, torch.float32, torch.float64):
        x = x.float()
    return np.array(x.resolve_conj().resolve_neg().cpu().numpy())


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
    return {n: to_numpy(t) for n, t in found.items() if t.is_floating_point()}


def _moved(x: Any, generator: Any) -> Any:
    """Every element up, down, or left where it is, by one unit in the last place."""
    import torch

    if not x.is_floating_point():
        return x
    way = torch.randint(-1, 2, x.shape, generator=generator).to(x.device)
    away = torch.nextafter(x, torch.where(way > 0, torch.inf, -torch.inf).to(x))
    return torch.where((way == 0) | (x == 0), x, away)


def _tensors(module: Any) -> Iterator[Any]:
    yield from module.parameters()
    yield from module.buffers()
