"""A training step of torch code: what it computes up to its loss is traced, the rest recorded.

    def step(x, y):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

`backward` says which tensor is the loss; clipping and the optimizer's own step are known rules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from zoo.containers.errors import UsageError

_SHAPE = (
    "a step is zero_grad(), a loss, backward(), clipping if wanted, and step() of one optimizer; "
    "else give the loss alone, and take the step with nnx.Optimizer (convert.optim has torch's "
    "rules)"
)


@dataclass
class Clip:
    """How the gradients are clipped: to a norm of all of them, or each number to a value."""

    kind: str  # "norm" or "value"
    limit: float
    order: float = 2.0


@dataclass
class Step:
    """What of a training step is not traced."""

    name: str
    function: Callable[..., Any]
    optimizer: Any
    modules: Sequence[Any]
    clips: list[Clip] = field(default_factory=list)
    training: bool | None = None  # the mode that it sets; None if it leaves the modules' own

    @property
    def trains(self) -> bool:
        """Whether it is in train mode: by itself, or as its modules are."""
        own = self.training
        return any(part.training for part in self.modules) if own is None else own

    @contextlib.contextmanager
    def mode_kept(self) -> Iterator[None]:
        """The function's own `model.train()` is noted, and changes nothing."""

        def train(mode: bool = True) -> None:
            self.training = mode

        with contextlib.ExitStack() as stack:
            for part in self.modules:
                stack.enter_context(mock.patch.object(part, "train", train))
            yield

    def __deepcopy__(self, memo: Any) -> Step:
        return self  # a copy of the module is run by the same function


def recorded(
    function: Callable[..., Any], optimizers: Sequence[Any], modules: Sequence[Any]
) -> tuple[Callable[..., Any], Step]:
    """The function as one that gives (the loss, what it returns) and changes nothing; and what it
    would have changed, filled in when it is first run."""
    name = getattr(function, "__name__", type(function).__name__)
    if len({id(o) for o in optimizers}) > 1:
        raise UsageError(f"{name} uses {len(optimizers)} optimizers", _SHAPE)
    step = Step(name, function, optimizers[0], modules)

    def run(*args: Any, **kwargs: Any) -> Any:
        seen = _Seen(step)
        with seen.recording():
            result = function(*args, **kwargs)
        return seen.loss_of(), result

    return run, step


class _Norm:
    """What stands for the norm of the gradients, which no graph of the loss has."""

    def __init__(self, name: str) -> None:
        self.__dict__["name"] = name

    def __getattr__(self, attribute: str) -> Any:
        raise UsageError(
            f"{self.name} uses the norm that clip_grad_norm_ gives",
            "leave that out, or give the loss alone",
        )


class _Seen:
    """One run of a step, in which nothing is trained."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.events: list[str] = []
        self.loss: Any = None
        step.clips = []

    def refuse(self, what: str) -> UsageError:
        return UsageError(f"{self.step.name} {what}", _SHAPE)

    def loss_of(self) -> Any:
        order = [e for e in self.events if e != "zero_grad"]
        if order != ["backward", *["clip"] * len(self.step.clips), "step"]:
            raise self.refuse(f"does {', '.join(order) or 'nothing'} in this order")
        after = self.events.index("backward")
        between = self.events[after : self.events.index("step")]
        if "zero_grad" not in self.events or "zero_grad" in between:
            raise self.refuse("adds up gradients of several steps, or trains by none")
        return self.loss

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        import torch

        plain, optimizer = torch.Tensor.item, self.step.optimizer

        def backward(loss: Any, *args: Any, **kwargs: Any) -> None:
            if any(x is not None for x in (*args, kwargs.get("gradient"), kwargs.get("inputs"))):
                raise self.refuse("gives backward() arguments")
            self.events.append("backward")
            self.loss = loss

        def item(x: Any) -> Any:
            return plain(x) if self.loss is None else x.detach()

        def update(closure: Any = None, **kwargs: Any) -> None:
            if closure is not None:
                raise self.refuse("gives the optimizer a closure")
            self.events.append("step")

        def zero_grad(*args: Any, **kwargs: Any) -> None:
            self.events.append("zero_grad")

        with contextlib.ExitStack() as stack:
            stack.enter_context(self.step.mode_kept())
            stack.enter_context(mock.patch.object(torch.Tensor, "backward", backward))
            stack.enter_context(mock.patch.object(torch.Tensor, "item", item))
            stack.enter_context(mock.patch.object(optimizer, "step", update))
            stack.enter_context(mock.patch.object(optimizer, "zero_grad", zero_grad))
            for part in self.step.modules:  # model.zero_grad() is the same
                stack.enter_context(mock.patch.object(part, "zero_grad", zero_grad))
            for name, place in self._clipping():
                stack.enter_context(mock.patch.dict(place, {name: self._clip(place[name])}))
            yield

    def _clipping(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Where torch's functions that clip gradients are found, by name."""
        import torch

        clipping = (torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_)
        own = getattr(self.step.function, "__globals__", {})
        for place in (vars(torch.nn.utils), vars(torch.nn.utils.clip_grad), own):
            yield from [(n, place) for n, x in place.items() if any(x is c for c in clipping)]

    def _clip(self, function: Any) -> Callable[..., Any]:
        kind = "norm" if "norm" in function.__name__ else "value"

        def clip(parameters: Any, limit: Any, norm_type: Any = 2.0, **kwargs: Any) -> Any:
            if hasattr(parameters, "requires_grad"):
                parameters = [parameters]
            given = {id(p) for p in parameters if p.requires_grad}
            trained = {id(p) for g in self.step.optimizer.param_groups for p in g["params"]}
            if given & trained and not given >= trained:  # while it is traced neither is known
                raise self.refuse("clips the gradients of some parameters only")
            self.events.append("clip")
            self.step.clips.append(Clip(kind, float(limit), float(norm_type)))
            return _Norm(self.step.name) if kind == "norm" else None

        return clip


def clipped(gradients: Any, clips: Sequence[Clip]) -> Any:
    """A tree of gradients, clipped as torch.nn.utils does it."""
    import jax
    import jax.numpy as jnp

    for clip in clips:
        if clip.kind == "value":
            gradients = jax.tree.map(lambda g, a=clip.limit: jnp.clip(g, -a, a), gradients)
            continue
        norms = jnp.stack(
            [jnp.linalg.norm(g.ravel(), clip.order) for g in jax.tree.leaves(gradients)]
        )
        factor = jnp.minimum(clip.limit / (jnp.linalg.norm(norms, clip.order) + 1e-6), 1.0)
        gradients = jax.tree.map(lambda g, f=factor: g * f.astype(g.dtype), gradients)
    return gradients
