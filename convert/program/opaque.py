"""Calls that stay whole in an export: those of a module class or a Python function with a rule.

Each becomes one operation `zooconvert.call` whose first argument says which it is; what it gives is
known from torch's own run of it on tensors without values.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np

from convert.program.nesting import Nesting, taken_apart
from convert.runtime.arrays import is_array, leaves, replaced
from zoo.containers.errors import UsageError

OPERATION = "zooconvert.call.default"


@dataclass
class SealedCall:
    """One call: its arguments with the tensors' places open, and how its result nests."""

    rule: Callable[..., Any]
    arguments: dict[str, Any]  # args, kwargs, and of a module its tensors and plain attributes
    paths: list[str]
    run: Callable[[dict[str, Any]], Any]
    outputs: Nesting | None = None
    plain: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Opaque:
    """A module class or a function, and the JAX function that stands for its calls."""

    what: Any
    rule: Callable[..., Any]


_TENSOR = object()  # in the place of one, in what a call gives
CALLS: dict[str, SealedCall] = {}  # of every export: a graph names its calls


def _operation() -> Any:
    """The operation, defined once a process."""
    import torch

    if not hasattr(torch.ops.zooconvert, "call"):
        library: Any = torch.library.Library("zooconvert", "FRAGMENT")  # type: ignore[no-untyped-call]
        _KEPT.append(library)
        library.define("call(str which, Tensor[] tensors) -> Tensor[]")
        library.impl("call", _run, "CompositeExplicitAutograd")
        torch.library.register_fake("zooconvert::call", _run, lib=library)
    return torch.ops.zooconvert.call.default


_KEPT: list[Any] = []  # a library lives as long as somebody holds it


def _run(which: str, tensors: Any) -> Any:
    call = CALLS[which]
    made = call.run(dict(zip(call.paths, tensors, strict=True)))
    call.outputs, found = taken_apart(made, "", _unknown)
    call.plain = [_TENSOR if is_array(x) else x for x in found]
    return [x.clone() for x in found if is_array(x)]


def _unknown(path: str, x: Any) -> Any:
    raise UsageError(
        f"what a call with a rule gives holds a {type(x).__name__}",
        "give a rule to one that returns tensors, tuples or dicts",
    )


@contextlib.contextmanager
def sealed(root: Any, opaque: tuple[Opaque, ...]) -> Iterator[None]:
    """While it lasts, calls of what is opaque are single operations."""
    with contextlib.ExitStack() as stack:
        for one in opaque:
            if isinstance(one.what, type):
                for part in root.modules():
                    if isinstance(part, one.what):
                        stack.enter_context(_module_sealed(part, one))
            else:
                stack.enter_context(_function_sealed(one))
        yield


@contextlib.contextmanager
def _module_sealed(part: Any, one: Opaque) -> Iterator[None]:
    import torch

    forward, own = part.forward, "forward" in vars(part)

    def sealed_forward(*args: Any, **kwargs: Any) -> Any:
        held = dict(part.named_parameters()) | dict(part.named_buffers())
        given = {"args": args, "kwargs": kwargs, "tensors": held}

        def run(values: dict[str, Any]) -> Any:
            whole = replaced(given, values)
            inside = {f"part.{n}": t for n, t in whole["tensors"].items()}
            holder = _holding(part, forward)
            return torch.func.functional_call(holder, inside, whole["args"], whole["kwargs"])

        return _called(one, given | {"of": part}, run)

    part.forward = sealed_forward
    try:
        yield
    finally:
        if own:
            part.forward = forward
        else:
            del part.forward


def _holding(part: Any, forward: Callable[..., Any]) -> Any:
    """A module around another that calls its own forward, and not what stands in for it."""
    import torch

    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = part

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

    return Holder()


@contextlib.contextmanager
def _function_sealed(one: Opaque) -> Iterator[None]:
    """Every module's name for the function means the sealed one."""

    def stands_in(*args: Any, **kwargs: Any) -> Any:
        def run(values: dict[str, Any]) -> Any:
            whole = replaced({"args": args, "kwargs": kwargs}, values)
            return one.what(*whole["args"], **whole["kwargs"])

        return _called(one, {"args": args, "kwargs": kwargs}, run)

    there = [
        (m, name)
        for m in list(sys.modules.values())
        for name, value in list(getattr(m, "__dict__", {}).items())
        if value is one.what and m is not None
    ]
    with contextlib.ExitStack() as patches:
        for m, name in there:
            patches.enter_context(mock.patch.object(m, name, stands_in))
        yield


def _called(one: Opaque, arguments: dict[str, Any], run: Callable[..., Any]) -> Any:
    tensors = leaves({k: v for k, v in arguments.items() if k != "of"})
    which = str(len(CALLS))
    open_places = dict.fromkeys(tensors, np.empty(0))
    kept = replaced({k: v for k, v in arguments.items() if k != "of"}, open_places)
    if "of" in arguments:
        kept["of"] = arguments["of"]
    call = SealedCall(one.rule, kept, list(tensors), run)
    CALLS[which] = call
    made = iter(_operation()(which, list(tensors.values())))
    assert call.outputs is not None
    return call.outputs.built(next(made) if x is _TENSOR else x for x in call.plain)
