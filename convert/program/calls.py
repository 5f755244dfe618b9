"""One call of a torch module: bound to its parameters' names, run, made of other sizes."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from inspect import BoundArguments
from typing import Any

import numpy as np

from convert.program import refused
from convert.runtime.arrays import is_inexact, leaves, replaced
from convert.tensors import to_torch
from zoo.containers.errors import UsageError


def bound(signature: inspect.Signature, module: Any, inputs: Any) -> BoundArguments:
    """The arguments of one call, by the names of forward's parameters; arrays as torch tensors."""
    args, kwargs = (), {}
    if isinstance(inputs, Mapping):
        kwargs = {str(k): v for k, v in inputs.items()}
    else:
        args = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    try:
        found = signature.bind(*args, **kwargs)
    except TypeError as e:
        raise UsageError(
            f"{type(module).__name__}: {e}", f"give inputs for forward{signature}"
        ) from None
    held = [t.dtype for t in module.parameters() if t.is_floating_point()]

    def tensor(x: Any) -> Any:
        if hasattr(x, "detach"):
            return x.detach()
        x = to_torch(np.asarray(x))
        return x.to(held[0]) if held and x.is_floating_point() else x

    return with_tensors(found, tensor)


def with_tensors(call: BoundArguments, place: Callable[[Any], Any]) -> BoundArguments:
    """The call with `place` of every array among its arguments."""
    arrays = leaves(call.arguments)
    made = replaced(dict(call.arguments), {k: place(x) for k, x in arrays.items()})
    return BoundArguments(call.signature, made)


def fresh(call: BoundArguments) -> BoundArguments:
    """The call with tensors of its own: what a module writes into them is seen by nobody else."""
    return with_tensors(call, lambda x: x.clone())


def in_precision(call: BoundArguments, precision: str) -> BoundArguments:
    """The call with its inexact arrays in this precision."""
    import torch

    from convert.runtime.arrays import dtype_in

    def cast(x: Any) -> Any:
        return x.to(getattr(torch, dtype_in(x, precision))) if is_inexact(x) else x

    return with_tensors(call, cast)


def runs(module: Any, call: BoundArguments) -> Any:
    """What torch gives for the call. UsageError where it does not run."""
    import torch

    try:
        with torch.no_grad(), buffers_kept(module):
            given = fresh(call)
            return module(*given.args, **given.kwargs)
    except Exception as e:
        raise refused.call_error(e, module) from e


@contextlib.contextmanager
def buffers_kept(module: Any) -> Iterator[None]:
    """What a run of the module writes into its buffers is put back afterwards."""
    import torch

    before = {n: (t, t.detach().clone()) for n, t in module.named_buffers() if not t.is_meta}
    try:
        yield
    finally:
        with torch.no_grad():
            for t, value in before.values():
                t.copy_(value)


def resized(call: BoundArguments, sizes: Mapping[str, Mapping[int, int]]) -> BoundArguments:
    """The call with arrays of other sizes, by path and axis: their rows are repeated, or cut."""
    import torch

    arrays = leaves(call.arguments)
    made = {}
    for name, axes in sizes.items():
        x = arrays[name]
        for axis, size in axes.items():
            x = x.index_select(axis, torch.arange(size, device=x.device) % x.shape[axis])
        made[name] = x
    return BoundArguments(call.signature, replaced(dict(call.arguments), made))


def shapes_of(call: BoundArguments) -> dict[str, tuple[int, ...]]:
    """The shape of every array among the arguments, by path."""
    return {n: tuple(x.shape) for n, x in leaves(call.arguments).items()}


def of_shapes(call: BoundArguments, shapes: Mapping[str, tuple[int, ...]]) -> BoundArguments:
    """The call with arrays of these shapes."""
    return resized(call, {n: dict(enumerate(shape)) for n, shape in shapes.items()})


def larger(module: Any, call: BoundArguments) -> BoundArguments:
    """The call with sizes of 1 made 2, where torch runs that: a size of 1 would be baked in."""
    arrays = leaves(call.arguments)
    firsts = [(n, 0) for n, x in arrays.items() if x.ndim and x.shape[0] == 1]
    rest = [(n, a) for n, x in arrays.items() for a in range(1, x.ndim) if x.shape[a] == 1]
    for places in (firsts, *([place] for place in rest)):
        if not places:
            continue
        sizes = {n: {a: 2 for m, a in places if m == n} for n, _ in places}
        try:
            tried = resized(call, sizes)
            runs(module, tried)
        except UsageError:
            continue
        call = tried
    return call


class in_mode:  # noqa: N801
    """A context in which a module and its parts are in one mode; each is as it was afterwards."""

    def __init__(self, module: Any, training: bool) -> None:
        self.module, self.training = module, training

    def __enter__(self) -> None:
        self.before = {m: m.training for m in self.module.modules()}
        self.module.train(self.training)

    def __exit__(self, *error: Any) -> None:
        for part, training in self.before.items():
            part.training = training
